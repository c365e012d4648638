"""Settings of a process that change its speed but no result: waiting threads, garbage collections, and its exit.

Importing torch and transformers creates 600,000 objects. Python's garbage collector visits them again and again while
they are created, and the interpreter frees them one by one when it exits. Both take seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator

RARELY = (50_000, 20, 100)
"""Thresholds of the garbage collector while a process starts; `gc.set_threshold` describes them."""

SPIN_VARIABLE = "GOMP_SPINCOUNT"
"""Environment variable that libgomp, PyTorch's thread library on Linux, reads when it is loaded."""

SPINS = 20_000
"""Number of times that a waiting thread checks for work before it gives its core away; libgomp's default is 300,000.

On a busy machine, a spinning thread takes the core from the thread that it waits for (`benchmarks/bench_neighbour.py`).
"""

WAITING = ("OMP_WAIT_POLICY", SPIN_VARIABLE, "KMP_BLOCKTIME")
"""Environment variables that say how threads wait; if the user sets one of them, lorakit sets none."""


def limit_spinning() -> None:
    """Limit how long the threads of this process spin while they wait; call it before torch is imported."""
    if not any(name in os.environ for name in WAITING):
        os.environ[SPIN_VARIABLE] = str(SPINS)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage rarely within a block that imports packages or builds a model, unless that is set already."""
    before = gc.get_threshold()
    if before[0] == 0 or before[0] >= RARELY[0]:
        yield
        return
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        if gc.get_threshold() == RARELY:  # otherwise the block has set its own
            gc.set_threshold(*before)


class QuickExit:
    """Ends a process as soon as its exit functions have run, without freeing its objects one by one.

    The functions that other modules register with `atexit` run first, because they run in reverse order. So an instance
    is to be created before other modules are imported. The interpreter ends as usual if no code was set, as after an
    exception, and under a debugger, a profiler or a measurement of coverage, which write their results at the end.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        atexit.register(self._end)

    def set_code(self, code: int) -> int:
        """Set the exit code of the process, and return it."""
        self._code = code
        return code

    def _end(self) -> None:
        if self._code is None or is_observed():
            return
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # a closed pipe, a closed stream, or no stream
                return  # the interpreter reports it
        os._exit(self._code)


def is_observed() -> bool:
    """Return whether a debugger, a profiler or a measurement of coverage observes this process."""
    return sys.gettrace() is not None or sys.getprofile() is not None or "coverage" in sys.modules
