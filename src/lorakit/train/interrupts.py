"""Ctrl-C and SIGTERM once: finish the step and save; twice: stop at once.

Knows nothing about what is being finished.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))

_ANSWER = b"\ninterrupted: finishing this step and saving a checkpoint; once more stops at once.\n"


class Interrupts:
    """A context in which the first signal is remembered and the second raises `KeyboardInterrupt`.

    Outside the main thread Python gives no signals, so there it remembers nothing.

    Attributes:
        requested: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):
            os.write(2, _ANSWER)  # past Python's buffers: they may be in use where the signal came
