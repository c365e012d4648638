"""Settings for memory that a process holds besides tensors: blocks that malloc keeps, and matmuls that oneDNN compiled.

A training step frees and allocates tensors of the same sizes repeatedly; returning each to the kernel, which must then
clear its pages again, can cost a third of the step. And each new shape of a bfloat16 matmul on a CPU is compiled and
cached: about 0.6 MB, up to 1024 of them in either of two caches. With rows of varying lengths, that is more than the
step itself. Only the command line changes these settings, at its start, and reports it: importing lorakit changes
nothing in a process.
"""

from __future__ import annotations

import ctypes
import os
import platform

SWITCH = "LORAKIT_ALLOCATOR"
"""Environment variable; "stock" leaves malloc unchanged."""

MALLOC_MESSAGE = (
    f"malloc keeps freed memory in this process, so that the next step can reuse it (disable with {SWITCH}=stock)."
)
"""Message of `set_up` if `keep_large_blocks` took effect."""

CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 1}
"""Environment variable -> entries of the cache it bounds; read at the first matmul, default 1024.

oneDNN's own cache (its developer guide, "Primitive Cache") must hold what one step computes, or every layer compiles
again: a step of 4 equal rows had 57 matmuls, one of 4 rows of new lengths has about 45 new ones. PyTorch's second
cache, of ideep, keeps another copy of each and avoids no compilation; a capacity of 0 makes it crash.
"""

MATMUL_MESSAGE = (
    f"oneDNN keeps the last {CACHES['ONEDNN_PRIMITIVE_CACHE_CAPACITY']} compiled bfloat16 matmuls "
    f"(set {' and '.join(CACHES)} to change this)."
)
"""Message of `set_up` if `limit_compiled_matmuls` took effect."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # mallopt takes an int: blocks below 2 GiB stay on the heap, and the heap is not trimmed


def keep_large_blocks() -> bool:
    """Configure malloc of this process to keep freed memory.

    Returns:
        Whether it took effect: not with another allocator or C library, or with `LORAKIT_ALLOCATOR=stock`.
    """
    if os.environ.get(SWITCH, "").lower() == "stock" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))


def limit_compiled_matmuls() -> bool:
    """Limit the compiled matmuls that this process caches; call before the first matmul.

    Results do not change: an evicted matmul is compiled again, in about 0.3 ms.

    Returns:
        Whether it set a limit: values that the user set are kept.
    """
    theirs = set(os.environ)
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" in theirs:  # oneDNN's former name, still read
        theirs.add("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    ours = {name: str(entries) for name, entries in CACHES.items() if name not in theirs}
    os.environ.update(ours)
    return bool(ours)


def set_up() -> list[str]:
    """Apply both settings, for a command that trains or evaluates.

    Returns:
        A message for each that took effect.
    """
    kept, few = keep_large_blocks(), limit_compiled_matmuls()
    return [message for message, took in ((MALLOC_MESSAGE, kept), (MATMUL_MESSAGE, few)) if took]
