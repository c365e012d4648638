"""Building the kernels: once, by the available compiler, and with a reason if it fails."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.durable import sha256_file
from lorakit.ops.kernels import building, compiled

from ...sampling import of_inner_session

needs_a_compiler = pytest.mark.skipif(
    all(shutil.which(name) is None for name in building.COMPILERS), reason="no C compiler"
)
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may be another user")
ROOT = Path(__file__).resolve().parents[3]
OTHER = 54321
"""A user id without a passwd entry."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unoptimized: None) -> Iterator[None]:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(building.SWITCH, raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(building.tempfile, "tempdir", str(tmp_path))
    building.built.cache_clear()
    yield
    building.built.cache_clear()


def without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: Any) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "LORAKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@needs_a_compiler
def test_it_is_built_once_and_kept(tmp_path: Path) -> None:
    first = building.built("BF16")
    assert first.functions is not None
    folder = tmp_path / "cache" / "kernels"
    (made,) = folder.iterdir()
    assert f"cached in {folder}" in first.why
    before = made.stat()
    building.built.cache_clear()
    assert building.built("BF16").functions is not None
    assert list(folder.iterdir()) == [made]
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # not built again


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(building.SWITCH, "off")
    found = building.built("")
    assert found == (None, "LORAKIT_KERNELS=off", False)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = building.built("")
    assert found.functions is None and found.lacks_compiler and "gcc, cc, clang" in found.why
    monkeypatch.setenv("CC", "one-that-is-not-there")
    building.built.cache_clear()
    found = building.built("")
    assert found.functions is None and found.lacks_compiler and "one-that-is-not-there" in found.why


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", script(tmp_path, "exit 1\n"))
    found = building.built("")
    assert found.functions is None
    assert f"{tmp_path}/compiler could not compile rows.c" in found.why
    assert not list((tmp_path / "cache" / "kernels").iterdir())


@needs_a_compiler
def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(found for name in building.COMPILERS if (found := shutil.which(name)))
    refusing = f'for a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec {real} "$@"\n'
    monkeypatch.setenv("CC", script(tmp_path, refusing))
    assert building.built("").functions is not None


@needs_a_compiler
def test_a_cache_that_cannot_be_written_leaves_pytorch_and_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "a file"))
    before = sorted(tmp_path.iterdir())
    compiled.kernels.cache_clear()
    try:
        assert compiled.kernels() is None
        assert f"{tmp_path / 'a file'}" in compiled.describe()
    finally:
        compiled.kernels.cache_clear()
    assert sorted(tmp_path.iterdir()) == before  # also the directory of temporary files
    (record,) = caplog.records
    assert record.name.startswith("lorakit")
    assert f"{tmp_path / 'a file'}" in record.getMessage()
    assert "LORAKIT_CACHE" in record.getMessage()


@needs_a_compiler
def test_what_lies_in_the_shared_temporary_folder_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / f"lorakit-{os.getuid()}"
    planted.mkdir(0o700)
    monkeypatch.setenv("LORAKIT_CACHE", "/proc/none")
    monkeypatch.setattr(building.ctypes, "CDLL", lambda *_, **__: pytest.fail("loaded"))
    assert building.built("").functions is None
    assert not list(planted.iterdir())


@needs_a_compiler
@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_library_is_built_again_and_not_loaded(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader accepts both: the first ends the process when it is used, the second computes with another constant."""
    assert building.built("").functions is not None
    (made,) = (tmp_path / "cache" / "kernels").iterdir()
    whole = made.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    copy = made.with_name("copy")  # the loaded library is mapped
    copy.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else bytes(changed))
    copy.replace(made)
    made.chmod(0o700)
    building.built.cache_clear()
    load = building.ctypes.CDLL

    def loaded(name: str, *more: Any, **words: Any) -> Any:
        assert Path(name).name == "rows.so" or sha256_file(name)[:8] in Path(name).name
        return load(name, *more, **words)

    monkeypatch.setattr(building.ctypes, "CDLL", loaded)
    assert building.built("").functions is not None


@pytest.mark.costly
@needs_a_compiler
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
@pytest.mark.parametrize("which", ["kernels", ".", ".."])
def test_a_directory_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, mode: int
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "parent" / "cache"))
    assert building.built("").functions is not None
    folder = tmp_path / "parent" / "cache" / which
    folder.resolve().chmod(mode)
    building.built.cache_clear()
    monkeypatch.setattr(building.ctypes, "CDLL", lambda *_, **__: pytest.fail("loaded"))
    found = building.built("")
    assert found.functions is None
    assert str(folder.resolve()) in found.why


@pytest.mark.costly
@needs_a_compiler
@needs_root
@pytest.mark.parametrize("which", ["kernels", ".", ".."])
def test_a_directory_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "parent" / "cache"))
    assert building.built("").functions is not None
    folder = (tmp_path / "parent" / "cache" / which).resolve()
    os.chown(folder, OTHER, OTHER)
    building.built.cache_clear()
    monkeypatch.setattr(building.ctypes, "CDLL", lambda *_, **__: pytest.fail("loaded"))
    found = building.built("")
    assert found.functions is None
    assert str(folder) in found.why


@needs_a_compiler
def test_the_mode_of_our_own_directory_is_put_right(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True, mode=0o755)
    folder.chmod(0o755)
    (tmp_path / "cache").chmod(0o755)  # as a home and its cache are by default
    assert building.built("").functions is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o755


@pytest.mark.costly
@needs_a_compiler
@pytest.mark.parametrize("spoil", ["mode", "link", "text", "cut", "directory"])
def test_a_library_that_is_not_ours_or_not_whole_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    assert building.built("").functions is not None
    (tmp_path / "cache").rename(tmp_path / "moved")  # a path that is already loaded is not loaded again
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "moved"))
    folder = tmp_path / "moved" / "kernels"
    (made,) = folder.iterdir()
    elsewhere = tmp_path / "elsewhere.so"
    if spoil == "mode":
        made.chmod(0o777)
    elif spoil == "link":
        made.rename(elsewhere)
        made.symlink_to(elsewhere)
    elif spoil == "directory":
        made.unlink()
        made.mkdir()
    else:
        made.unlink()
        made.write_bytes(b"no library" if spoil == "text" else b"")
        made.chmod(0o700)
    building.built.cache_clear()
    found = building.built("")
    if spoil == "directory":
        assert found.functions is None
        return
    assert found.functions is not None
    (again,) = folder.iterdir()
    assert again == made
    assert not made.is_symlink()
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert made.stat().st_size > 1000


@needs_a_compiler
@needs_root
def test_a_library_of_another_user_is_built_again(tmp_path: Path) -> None:
    assert building.built("").functions is not None
    (made,) = (tmp_path / "cache" / "kernels").iterdir()
    os.chown(made, OTHER, OTHER)
    inode = made.stat().st_ino
    building.built.cache_clear()
    assert building.built("").functions is not None
    assert (made.stat().st_uid, made.stat().st_ino == inode) == (0, False)


PROGRAM = """
import os, torch
from lorakit.ops.kernels import compiled
from lorakit.ops.norm import Norm
os.setresuid(54321, 54321, 54321)
x = torch.ones(2, 8)
for _ in range(2):
    n, _ = Norm("rms", torch.ones(8)).forward(x)
assert torch.allclose(n, x, atol=1e-4)
print("none" if compiled.kernels() is None else "some", flush=True)
"""


@pytest.mark.costly
@needs_a_compiler
@needs_root
@pytest.mark.parametrize("variable", ["X=", "HOME=/", "HOME=/root", "HOME=/nowhere", "LORAKIT_CACHE=~strange/x"])
def test_operations_of_a_user_without_a_home(variable: str) -> None:
    """A container often runs with a user id that has no passwd entry."""
    name, _, value = variable.partition("=")
    environment = {name: value, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "none\n"), done.stderr
    assert done.stderr.count("LORAKIT_CACHE") >= 1
    assert len(done.stderr.splitlines()) == 1


def test_no_home_and_no_passwd_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_home(monkeypatch)
    assert building.built("").functions is None


@needs_a_compiler
def test_a_compiler_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, text = next(found for name in building.COMPILERS if (found := shutil.which(name))), 'exec "$@"\n'
    monkeypatch.setenv("CC", f"'{script(tmp_path, text)}' {real}")
    found = building.built("")
    assert found.functions is not None
    assert real in found.why


@pytest.mark.parametrize("asked", ["'gcc", "", " ", "one-that-is-not-there gcc"])
def test_words_that_name_no_compiler(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CC", asked)
    assert building.built("").functions is None


@pytest.mark.parametrize(
    "text", ["sleep 60\n", "kill -SEGV $$\n", "[ $1 = --version ] && exit 0\nsleep 60\n", "exit 0\n"]
)
def test_a_compiler_that_hangs_or_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(building, "SECONDS", 0.2)
    monkeypatch.setenv("CC", script(tmp_path, text))
    found = building.built("")
    assert found.functions is None
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_a_compiler_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiler").write_bytes(b"\x7fELF no program")
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "compiler"))
    assert building.built("").functions is None


@needs_a_compiler
def test_a_library_that_hides_its_functions_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(found for name in building.COMPILERS if (found := shutil.which(name)))
    monkeypatch.setenv("CC", f"{real} -fvisibility=hidden")
    assert building.built("").functions is None
    assert not list((tmp_path / "cache" / "kernels").iterdir())


@needs_a_compiler
def test_another_processor_gets_a_library_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may be shared by machines with different processors."""
    assert building.built("").functions is not None
    read = Path.read_text

    def other(path: Path, *args: Any, **kwargs: Any) -> str:
        return "flags\t: fpu sse2\n" if str(path) == "/proc/cpuinfo" else read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", other)
    building.built.cache_clear()
    assert building.built("").functions is not None
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 2


@pytest.mark.costly(cases=0)
@needs_a_compiler
def test_processes_that_build_at_once(tmp_path: Path) -> None:
    program = "\n".join(
        [
            "from lorakit.ops.kernels import building",
            "building.FLAGS = ('-O0', *building.FLAGS[1:])",
            "assert building.built('').functions is not None, building.built('').why",
        ]
    )
    environment = {**os.environ, "LORAKIT_CACHE": str(tmp_path / "shared")}
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    assert len(list((tmp_path / "shared" / "kernels").iterdir())) == 1


@pytest.mark.slow
def test_all_operations_without_kernels(pytestconfig: pytest.Config) -> None:
    """Every operation falls back to PyTorch: its tests hold for the fallback too."""
    options = ["-q", "-x", "-p", "no:cacheprovider", *of_inner_session(pytestconfig)]
    command = [sys.executable, "-m", "pytest", *options, "tests/ops", "-m", "not slow and not gpu"]
    environment = {**os.environ, building.SWITCH: "off"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
