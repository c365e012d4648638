"""Python's garbage collector held back while thousands of lasting objects are made, which it would walk in vain."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """A block in which the garbage collector does not run, if it did before; what it missed it finds afterwards.

    Yields:
        Nothing.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
