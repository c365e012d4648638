"""Files that are mapped into this process: where they are, and giving back pages that can be read again.

Pages of a mapped file count as memory of the process from the first access. The kernel drops unmodified ones when
memory is short; `release_pages` drops them at once. On systems other than Linux, nothing is released.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

PAGEMAP = "/proc/self/pagemap"
"""File with a 64-bit entry for each page of this process (kernel documentation, "pagemap")."""

_ENTRY = 8
_TOP = _ENTRY - 1 if sys.byteorder == "little" else 0
"""Position of the byte of an entry with the highest bits."""
_KIND = 5
"""Position of the bit of this byte that is set if the page belongs to a file; above it: is swapped, is present."""


def file_mappings() -> list[tuple[int, int]]:
    """Return the ranges of addresses, (first, behind the last), to which files are mapped; empty if not on Linux."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return []
    lines = (line.split(maxsplit=5) for line in maps.splitlines())
    ranges = (words[0].partition("-") for words in lines if len(words) > 4 and words[4] != "0")  # words[4]: the inode
    return [(int(first, 16), int(last, 16)) for first, _, last in ranges]


def release_pages(first: int, size: int) -> bool:
    """Remove unmodified pages of a mapped file, by address and bytes, from this process; return whether they were
    removed.

    The contents do not change: nothing is removed if any of the pages has been modified or is not a page of a file. The
    file stays in the system's page cache. Other threads must not write to these pages during the call.
    """
    begin = first // mmap.PAGESIZE
    count = -(-(first + size) // mmap.PAGESIZE) - begin
    try:
        with Path(PAGEMAP).open("rb", buffering=0) as file:
            file.seek(begin * _ENTRY)
            entries = file.read(count * _ENTRY)
        kinds = {byte >> _KIND for byte in set(entries[_TOP::_ENTRY])}  # a set has few elements, a weight many pages
        # a modified page of a private mapping is a copy, which belongs to no file
        if len(entries) != count * _ENTRY or not count or kinds & {0b010, 0b100, 0b110}:
            return False
        arguments = ctypes.c_void_p(begin * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
        return not ctypes.CDLL(None).madvise(*arguments, mmap.MADV_DONTNEED)
    except (OSError, AttributeError):
        return False
