"""Giving back the pages of mapped files: contents never change, and modified pages stay."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.allocator import PAGEMAP, file_mappings, release_pages

PAGES = 64

pytestmark = pytest.mark.skipif(not Path(PAGEMAP).is_file(), reason="only Linux lists the pages of a process")


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[mmap.mmap]:
    """A private, writable mapping of a file of `PAGES` pages; every page has been read."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (PAGES * mmap.PAGESIZE // 256))
    with path.open("rb") as file:
        found = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert sum(found[:: mmap.PAGESIZE]) == 0
    yield found
    found.close()


def address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def resident(first: int) -> int:
    """Return how many of the pages of a mapping are in the memory of this process."""
    with Path(PAGEMAP).open("rb") as file:
        file.seek(first // mmap.PAGESIZE * 8)
        return sum(entry >> 63 for entry in memoryview(file.read(PAGES * 8)).cast("Q"))


def test_unmodified_pages_leave_the_process_and_are_read_again(mapped: mmap.mmap) -> None:
    first, before = address(mapped), bytes(mapped)
    assert resident(first) == PAGES
    assert release_pages(first, len(mapped))
    assert resident(first) == 0
    assert mapped[:] == before and resident(first) == PAGES


def test_the_pages_of_a_part_are_whole_pages(mapped: mmap.mmap) -> None:
    first, before = address(mapped), bytes(mapped)
    assert release_pages(first + mmap.PAGESIZE + 100, mmap.PAGESIZE)  # ends in the next page
    assert resident(first) == PAGES - 2
    assert mapped[:] == before


@pytest.mark.parametrize("written", [3 * mmap.PAGESIZE, 5 * mmap.PAGESIZE - 1], ids=["inside", "in the last page"])
def test_a_modified_page_stays(mapped: mmap.mmap, written: int) -> None:
    mapped[written] = 77
    first, before = address(mapped), bytes(mapped)
    assert not release_pages(first + 3 * mmap.PAGESIZE, mmap.PAGESIZE + 10)
    assert mapped[:] == before and mapped[written] == 77 and resident(first) == PAGES
    assert release_pages(first, 3 * mmap.PAGESIZE)
    assert mapped[:] == before


def test_memory_that_is_not_a_file_stays() -> None:
    held = ctypes.create_string_buffer(b"x" * (PAGES * mmap.PAGESIZE))
    assert not release_pages(ctypes.addressof(held), len(held))
    assert held.raw == b"x" * (PAGES * mmap.PAGESIZE) + b"\0"
    assert not release_pages(0, 0)


def test_a_mapping_is_listed(mapped: mmap.mmap) -> None:
    first = address(mapped)
    assert any(begin <= first and first + len(mapped) <= end for begin, end in file_mappings())


def test_a_system_without_a_list_of_pages_keeps_them(mapped: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.allocator.PAGEMAP", "/proc/self/missing")
    assert not release_pages(address(mapped), len(mapped))
    assert resident(address(mapped)) == PAGES
