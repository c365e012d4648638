"""Memory of a process, as counted by the kernel (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_with_weights(model: Any) -> int:
    """Return the resident bytes after touching every weight and trimming free memory; also resets the peak.

    Args:
        model: A torch module.
    """
    for parameter in model.parameters():
        parameter.detach().view(-1)[:: 1024 // parameter.element_size()].sum()  # touch every page
    gc.collect()
    with contextlib.suppress(
        AttributeError
    ):  # another C library: memory freed while building the model may still count
        ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """Return a size of this process in bytes: "VmRSS" now, of it "RssAnon" not in files, "VmHWM" at its peak."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """Measure the peaks of "VmHWM" (by the kernel) and of "RssAnon" (every 2 ms) within a context, in bytes."""
    found, ended = {"RssAnon": status("RssAnon")}, threading.Event()

    def sample() -> None:
        while not ended.wait(0.002):
            found["RssAnon"] = max(found["RssAnon"], status("RssAnon"))

    thread = threading.Thread(target=sample)
    CLEAR.write_text("5")  # resets the kernel's peak
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found["VmHWM"] = status("VmHWM")
