"""What a process holds beside its tensors: blocks that malloc keeps, and products that oneDNN compiled.

A training step frees and takes tensors of the same sizes again and again; handing each to the kernel and having its
pages cleared anew can cost a third of the step. And each new shape of a bfloat16 product on a CPU is compiled and kept,
about 0.6 MB, up to 1024 of them in either of two caches, which with rows of ever other lengths is more than the step.
Only the command line changes this, at its start, and says so: importing lorakit changes nothing of a process.
"""

from __future__ import annotations

import ctypes
import os
import platform

SWITCH = "LORAKIT_ALLOCATOR"
"""Environment variable: "stock" leaves malloc as it is."""

SAID = (
    f"Memory that is freed stays with this process, so that the next step need not clear it ({SWITCH}=stock: as usual)."
)
"""What a person is told where `keep_large_blocks` took effect."""

CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 1}
"""Environment variable -> entries of the cache it bounds; read at the first product, and the defaults are 1024.

oneDNN's own (its developer guide, "Primitive Cache") must hold what one step computes, or every layer compiles anew: a
step of 4 equal rows had 57 products, one of 4 rows of new lengths has about 45 new ones. PyTorch's second cache, of
ideep, keeps another copy of each and spares no compilation; a capacity of 0 makes it crash."""

SAID_OF_PRODUCTS = (
    f"Of the compiled bfloat16 products the last {CACHES['ONEDNN_PRIMITIVE_CACHE_CAPACITY']} stay "
    f"({' and '.join(CACHES)}: your own numbers)."
)
"""The same, where `keep_few_products` did."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # mallopt takes an int: blocks below 2 GiB stay on the heap, and the heap's end is not given back


def keep_large_blocks() -> bool:
    """Tell malloc of this process to keep what is freed.

    Returns:
        Whether it took it: not where another allocator or another C library is in force, or `LORAKIT_ALLOCATOR=stock`.
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


def keep_few_products() -> bool:
    """Have this process forget compiled products that it has not used for long; call before the first product.

    What is computed stays the same: a forgotten product is compiled again, in about 0.3 ms.

    Returns:
        Whether it set a bound: a person's own values stay.
    """
    theirs = set(os.environ)
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" in theirs:  # the name that oneDNN had before, still read
        theirs.add("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    ours = {name: str(entries) for name, entries in CACHES.items() if name not in theirs}
    os.environ.update(ours)
    return bool(ours)


def set_up() -> list[str]:
    """Both of the above, for a command that trains or evaluates.

    Returns:
        What a person is told, a sentence for each that took effect.
    """
    kept, few = keep_large_blocks(), keep_few_products()
    return [sentence for sentence, took in ((SAID, kept), (SAID_OF_PRODUCTS, few)) if took]
