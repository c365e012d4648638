"""Memory of this process: how malloc treats freed blocks, how many matmuls oneDNN caches, and pages of mapped files.

A training step repeatedly frees and reallocates tensors of the same sizes. If malloc returns each freed block to the
kernel, the kernel must clear the pages before they are used again, and clearing them can take a third of the step time.
On a CPU, a bfloat16 matmul is compiled for each new shape, and the compiled code (about 0.6 MB) is kept in two caches
of up to 1024 entries each. If row lengths vary, these caches can take more memory than the step itself. Only the
command line changes these two settings; it does so at startup and reports the changes.

Pages of a mapped file count as memory of the process from the first access. The kernel drops unmodified ones when
memory is short; `release_pages` drops them at once. On systems other than Linux, nothing is released.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import sys
from pathlib import Path

SWITCH = "LORAKIT_ALLOCATOR"
"""Environment variable; the value "stock" leaves malloc unchanged."""

MALLOC_MESSAGE = (
    f"malloc keeps freed memory in this process so that the next step can reuse it (disable with {SWITCH}=stock)."
)
"""Message that `set_up` returns if `keep_large_blocks` took effect."""

RETURNS_MESSAGE = (
    "malloc returns freed tensors, because the gathered weights of a sharded base would leave holes that are not used "
    f"again (disable with {SWITCH}=stock)."
)
"""Message that `set_up` returns if `return_large_blocks` took effect."""

CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 1}
"""Environment variable (read at the first matmul) -> maximum number of cache entries (default: 1024).

The oneDNN cache (developer guide, "Primitive Cache") must have room for all matmuls of a step; otherwise every layer
recompiles its matmuls. A step with 4 rows of equal length used 57 distinct matmuls; a step with 4 rows of new lengths
added about 45 more. The second cache, in PyTorch's ideep, stores another copy of each compiled matmul without saving
any compilation; a capacity of 0 causes a crash.
"""

MATMUL_MESSAGE = (
    f"oneDNN keeps the last {CACHES['ONEDNN_PRIMITIVE_CACHE_CAPACITY']} compiled bfloat16 matmuls "
    f"(set {' and '.join(CACHES)} to change this)."
)
"""Message that `set_up` returns if `limit_compiled_matmuls` took effect."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # the largest value that mallopt accepts
KEPT_BYTES = 128 << 20
"""Size from which malloc returns a freed block to the kernel. A hole of exactly the size of a tensor cannot be used for
it again, because PyTorch's tensors are aligned, so each step would leave holes of the size of its largest tensors.
Clearing the pages of such a tensor takes little time compared with computing it.
"""


RETURNED_BYTES = 128 << 10
"""Size from which malloc returns a freed block of a run with a sharded base: malloc's first value, which it otherwise
raises to 32 MB when blocks are freed."""


def keep_large_blocks() -> bool:
    """Make this process's malloc keep freed memory, except blocks of `KEPT_BYTES` or more, if it can."""
    return _set((M_MMAP_THRESHOLD, KEPT_BYTES), (M_TRIM_THRESHOLD, LARGEST))


def return_large_blocks() -> bool:
    """Make this process's malloc return freed blocks of `RETURNED_BYTES` or more to the kernel, if it can."""
    return _set((M_MMAP_THRESHOLD, RETURNED_BYTES))


def _set(*options: tuple[int, int]) -> bool:
    """Set options of malloc, unless another allocator is used or the user wants the stock settings."""
    if os.environ.get(SWITCH, "").lower() == "stock" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) for option, value in options)


def trim() -> None:
    """Return freed memory to the operating system, if malloc is glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _MallocInfo(ctypes.Structure):
    """The result of glibc's `mallinfo2`; only the size of free blocks is read."""

    _fields_ = (("others", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t))


def free_bytes() -> int:
    """Return the memory that malloc keeps for later use, in bytes; 0 if malloc is not that of glibc 2.33 or newer."""
    try:
        info = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    info.restype = _MallocInfo
    return int(info().fordblks)


def limit_compiled_matmuls() -> bool:
    """Limit the number of compiled matmuls that this process caches, and return whether any limit was set.

    Limits that the user has set are kept. The limit takes effect only before the first matmul. Results do not change:
    an evicted matmul is recompiled in about 0.3 ms.
    """
    theirs = set(os.environ)
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" in theirs:  # the variable's former name, which oneDNN still reads
        theirs.add("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    ours = {name: str(entries) for name, entries in CACHES.items() if name not in theirs}
    os.environ.update(ours)
    return bool(ours)


def set_up(*, is_sharded: bool = False) -> list[str]:
    """Apply both memory settings, for a command that trains or evaluates; return a message for each that took effect.

    `is_sharded` says that weights of the base are gathered and freed in each pass.
    """
    malloc, message = (return_large_blocks, RETURNS_MESSAGE) if is_sharded else (keep_large_blocks, MALLOC_MESSAGE)
    changed, few = malloc(), limit_compiled_matmuls()
    return [text for text, took in ((message, changed), (MATMUL_MESSAGE, few)) if took]


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
