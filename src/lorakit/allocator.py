"""Tune two memory settings of a process: freed blocks that malloc keeps, and compiled matmuls that oneDNN caches.

A training step frees and allocates tensors of the same sizes repeatedly. If malloc returns each freed block to the
kernel, which must then clear its pages again, this can take a third of the step time. On a CPU, a bfloat16 matmul is
compiled for each new shape and cached (about 0.6 MB); each of two caches holds up to 1024 entries. With rows of varying
lengths, the caches grow larger than the step's own memory. Only the command line changes these settings: it does so at
startup and reports the change. Importing lorakit does not affect the process.
"""

from __future__ import annotations

import ctypes
import os
import platform

SWITCH = "LORAKIT_ALLOCATOR"
"""Environment variable; "stock" leaves malloc unchanged."""

MALLOC_MESSAGE = (
    f"malloc keeps freed memory in this process so that the next step can reuse it (disable with {SWITCH}=stock)."
)
"""Message of `set_up` if `keep_large_blocks` took effect."""

CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 1}
"""Environment variable -> maximum number of entries in a cache; read at the first matmul, default 1024.

oneDNN's own cache (developer guide, "Primitive Cache") must hold all matmuls of a step; otherwise every layer compiles
its matmuls again. A step with 4 rows of equal length had 57 matmuls; one with 4 rows of new lengths adds about 45.
PyTorch's second cache, in ideep, stores another copy of each and avoids no compilation; it crashes at a capacity of 0.
"""

MATMUL_MESSAGE = (
    f"oneDNN keeps the last {CACHES['ONEDNN_PRIMITIVE_CACHE_CAPACITY']} compiled bfloat16 matmuls "
    f"(set {' and '.join(CACHES)} to change this)."
)
"""Message of `set_up` if `limit_compiled_matmuls` took effect."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # mallopt takes an int: blocks below 2 GiB stay on the heap, and the heap is not trimmed


def keep_large_blocks() -> bool:
    """Configure this process's malloc to keep freed memory.

    Returns:
        Whether the setting took effect; false with another allocator or C library, or if `LORAKIT_ALLOCATOR=stock`.
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
    """Limit the number of compiled matmuls that this process caches; call before the first matmul.

    Results do not change: an evicted matmul is recompiled in about 0.3 ms.

    Returns:
        Whether a limit was set; values that the user set are kept.
    """
    theirs = set(os.environ)
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" in theirs:  # oneDNN's former name, still read
        theirs.add("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    ours = {name: str(entries) for name, entries in CACHES.items() if name not in theirs}
    os.environ.update(ours)
    return bool(ours)


def set_up() -> list[str]:
    """Apply both settings for a command that trains or evaluates.

    Returns:
        A message for each setting that took effect.
    """
    kept, few = keep_large_blocks(), limit_compiled_matmuls()
    return [message for message, took in ((MALLOC_MESSAGE, kept), (MATMUL_MESSAGE, few)) if took]
