"""Directories from which code may be loaded: every case in which another user could have put it there."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakit.ops.kernels.building import is_private_file, private_directory

needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may be another user")
OTHER = 54321


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_what_is_missing_is_made_for_us_alone(tmp_path: Path) -> None:
    made = private_directory(tmp_path / "a" / "b" / "c")
    assert made == (tmp_path / "a" / "b" / "c").resolve()
    assert [mode(path) for path in (made, made.parent, made.parent.parent)] == [0o700] * 3
    assert private_directory(made) == made


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert private_directory(Path("x/../y")) == tmp_path.resolve() / "y"


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o711, 0o500])
def test_our_own_directory_gets_mode_0700(tmp_path: Path, bits: int) -> None:
    (tmp_path / "a").mkdir(bits)
    assert mode(private_directory(tmp_path / "a")) == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o707, 0o1777])
def test_a_directory_that_others_could_write_to_is_rejected_and_left(tmp_path: Path, bits: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(bits)
    with pytest.raises(PermissionError, match=str(tmp_path / "a")):
        private_directory(tmp_path / "a")
    assert mode(tmp_path / "a") == bits


def test_a_parent_that_others_can_write_to_needs_the_sticky_bit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(PermissionError, match=str(tmp_path / "a")):
        private_directory(tmp_path / "a" / "b")
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "a").chmod(0o1777)
    assert mode(private_directory(tmp_path / "a" / "b")) == 0o700


@needs_root
@pytest.mark.parametrize("which", ["a", "a/b"])
@pytest.mark.parametrize("bits", [0o700, 0o755])
def test_a_directory_of_another_user_is_rejected(tmp_path: Path, which: str, bits: int) -> None:
    """Also in a parent with the sticky bit: anyone may create a directory there before we do."""
    tmp_path.chmod(0o1777)
    private_directory(tmp_path / "a" / "b")
    (tmp_path / which).chmod(bits)
    os.chown(tmp_path / which, OTHER, OTHER)
    with pytest.raises(PermissionError, match=str(tmp_path / which)):
        private_directory(tmp_path / "a" / "b")
    assert mode(tmp_path / which) == bits


@needs_root
def test_a_link_is_followed_and_where_it_leads_is_checked(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert private_directory(tmp_path / "link" / "b") == tmp_path.resolve() / "a" / "b"
    os.chown(tmp_path / "a", OTHER, OTHER)
    with pytest.raises(PermissionError, match=str(tmp_path / "a")):
        private_directory(tmp_path / "link" / "b")


def test_a_link_that_leads_round_in_a_ring_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(OSError, match="link"):
        private_directory(tmp_path / "link" / "b")


def test_a_link_put_there_after_the_path_was_resolved_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir(0o700)
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(os.path, "realpath", lambda path: str(path))
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(NotADirectoryError, match=str(tmp_path / "a")):
            private_directory(path)


def test_a_file_in_the_way_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError, match=str(tmp_path / "a")):
        private_directory(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("gid", "name", "members", "accepted"),
    [
        (1234, "someone", [], True),
        (1234, "someone", ["someone"], True),
        (1234, "someone", ["another"], False),
        (1234, "people", [], False),
        (1235, "someone", [], False),
    ],
)
def test_the_private_group_of_the_user_may_write_to_a_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gid: int, name: str, members: list[str], accepted: bool
) -> None:
    """A umask of 002 is the default on systems with per-user groups."""
    parent = tmp_path.resolve() / "a"
    parent.mkdir()
    lstat = Path.lstat

    def with_group(path: Path) -> os.stat_result:
        values = list(lstat(path))
        if path == parent:
            values[stat.ST_MODE], values[stat.ST_GID] = stat.S_IFDIR | 0o775, gid
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", with_group)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_gid=1234, pw_name="someone"))
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))
    if accepted:
        assert private_directory(parent / "b") == parent / "b"
    else:
        with pytest.raises(PermissionError, match=str(parent)):
            private_directory(parent / "b")


def test_private_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert not is_private_file(path)
    path.write_text("")
    for bits, accepted in ((0o700, True), (0o644, True), (0o664, False), (0o646, False)):
        path.chmod(bits)
        assert is_private_file(path) is accepted
    path.chmod(0o700)
    (tmp_path / "link").symlink_to(path)
    assert not is_private_file(tmp_path / "link")
    assert not is_private_file(tmp_path)


@needs_root
def test_a_file_of_another_user_is_not_private(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    os.chown(tmp_path / "a", OTHER, OTHER)
    assert not is_private_file(tmp_path / "a")
