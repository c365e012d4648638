"""lorakit.registry.names: valid names, versions by hash and tag, rollbacks, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.durable import sealed, write_json
from lorakit.errors import AdapterError, AdapterFileError, UsageError
from lorakit.registry import NameEntry, check_name
from lorakit.registry.names import check_tag, split_version

A, B, C, D = (letter * 64 for letter in "abcd")


def entry(*hashes: str) -> NameEntry:
    found = NameEntry.first("legal", hashes[0])
    for hash in hashes[1:]:
        found = found.published(hash)
    return found


@pytest.mark.parametrize("name", ["", "a/b", "../a", "-a", ".a", "a@b", "a" * 65, "ä", "a b", "a\n"])
def test_names_that_a_runtime_rejects(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert (caught.value.field, caught.value.what) == ("name", name)


@pytest.mark.parametrize("name", ["a", "0", "legal-v2.1_x", "a" * 64])
def test_names_that_are_accepted(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("tag", ["0123456789ab", "a" * 64, "", "a/b"])
def test_tags_that_are_rejected(tag: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_tag(tag)
    assert caught.value.field == "tag"


@pytest.mark.parametrize("given", ["legal@", "@x", "legal@a@b", "legal@../x", "a/b@x"])
def test_versions_that_are_not_valid(given: str) -> None:
    with pytest.raises(UsageError):
        split_version(given)


def test_a_version_by_hash_and_tag() -> None:
    found = entry(A, B).tagged("stable", A)
    assert found.hash_of(None) == B
    assert found.hash_of(A[:12]) == found.hash_of(A) == found.hash_of("stable") == A
    for unknown in (A[:11], C[:12], "latest"):
        with pytest.raises(AdapterError) as caught:
            found.hash_of(unknown)
        assert (caught.value.what, caught.value.where, caught.value.field) == (unknown, "legal", "version")
        assert set(caught.value.allowed) == {"stable", A[:12], B[:12]}


def test_two_versions_never_have_the_same_12_digits() -> None:
    twin = A[:12] + "0" * 52
    with pytest.raises(AdapterError) as caught:
        entry(A, B).published(twin)
    assert caught.value.what == twin


def test_the_same_contents_again_change_nothing() -> None:
    found = entry(A, B)
    assert found.published(B) is found


def test_rollbacks_lead_to_what_a_version_replaced() -> None:
    """After a rollback from C to B, D replaces B: a rollback from D does not lead to C."""
    found = entry(A, B, C).rolled_back(None)
    assert (found.current, found.previous) == (B, (A,))
    found = found.published(D)
    assert (found.current, found.previous) == (D, (A, B))
    currents = [found := found.rolled_back(None), found := found.rolled_back(None)]
    assert [one.current for one in currents] == [B, A]
    with pytest.raises(AdapterError) as caught:
        found.rolled_back(None)
    assert caught.value.where == "legal"
    assert [event.action for event in found.history] == ["add", "add", "add", "rollback", "add", "rollback", "rollback"]
    assert [event.hash for event in found.history] == [A, B, C, B, D, B, A]


def test_rollbacks_to_a_version() -> None:
    found = entry(A, B, C).tagged("stable", A)
    to_a = found.rolled_back("stable")
    assert (to_a.current, to_a.previous) == (A, ())
    back = to_a.rolled_back(C[:12])
    assert (back.current, back.previous) == (C, (A,))
    assert back.rolled_back(C[:12]) is back


def test_old_versions_are_forgotten_but_not_those_in_use() -> None:
    found = entry(A, B, C, D).tagged("stable", A)
    assert found.with_newest(0).hashes == {D, A}
    one = found.with_newest(1)
    assert (one.hashes, one.previous, one.current) == ({D, C, A}, (A, C), D)
    assert [event.hash for event in one.history] == [A, C, D]
    assert found.with_newest(9) == found


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = entry(A, B).tagged("stable", A).rolled_back(None)
    write_json(tmp_path / "legal.json", found.as_json())
    assert NameEntry.read(tmp_path / "legal.json") == found
    with pytest.raises(AdapterError) as caught:
        NameEntry.read(tmp_path / "lega.json")
    assert (caught.value.what, caught.value.allowed) == ("lega", ("legal",))


@pytest.mark.parametrize(
    "change",
    [
        {"current": C},
        {"name": "other"},
        {"seal": "0"},
        {"format_version": 2},
        None,
    ],
    ids=str,
)
def test_a_damaged_entry_is_an_error(change: dict[str, object] | None, tmp_path: Path) -> None:
    path = tmp_path / "legal.json"
    text = json.dumps(entry(A).as_json() | (change or {}))
    path.write_text(text if change else text[:-9])
    with pytest.raises(AdapterFileError) as caught:
        NameEntry.read(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "change", [{"current": "../../x"}, {"tags": {"t": "x"}}, {"previous": [1]}, {"history": [{}]}, {"tags": 3}], ids=str
)
def test_a_sealed_entry_without_hashes_is_an_error(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "legal.json"
    values = {key: value for key, value in entry(A).as_json().items() if key != "seal"}
    path.write_text(json.dumps(sealed(values | change)))
    with pytest.raises(AdapterFileError):
        NameEntry.read(path)
