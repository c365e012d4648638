"""glibc's malloc, told to keep large blocks instead of giving them back to the system after every use.

A training step frees and takes tensors of the same sizes again and again; handing each to the kernel and having its
pages cleared anew can cost a third of the step. Only the command line does this, at its start, and says so: importing
lorakit changes nothing of a process.
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
