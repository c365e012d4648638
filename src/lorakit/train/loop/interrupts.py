"""Signal handling during a run: the first signal lets the current step finish; the second stops the run at once.

When a terminal is closed, programs in it receive SIGHUP, often twice (from the system and from the shell), and can no
longer write to it. Signals that the program ignores, such as SIGHUP under `nohup`, stay ignored.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeAlias

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_HANGUP = getattr(signal, "SIGHUP", None)

_ANSWER = b"\ninterrupted: finishing this step and saving a checkpoint; interrupt again to stop at once.\n"

_ACTION_BYTES = 1024  # more than `struct sigaction` needs: 152 bytes with glibc

_Action: TypeAlias = "ctypes.Array[ctypes.c_char]"


class Interrupts:
    """Record of the signals that arrive within a `recording` block.

    Attributes:
        requested: Whether a signal has arrived.
    """

    def __init__(self, is_answered: bool = True) -> None:
        self._is_answered = is_answered
        self.requested = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal.

        Raises:
            KeyboardInterrupt: A signal was already recorded, and this one does not say again that a terminal is closed.
        """
        if number == _HANGUP:
            _leave_terminal()
        if self.requested and number == _HANGUP:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):
            if self._is_answered:
                os.write(2, _ANSWER)  # bypasses Python's buffers, which may be in use when the signal arrives


@contextlib.contextmanager
def recording(is_answered: bool = True) -> Iterator[Interrupts]:
    """Record the first signal in a block, and raise `KeyboardInterrupt` on the second.

    Python delivers signals only to the main thread; in other threads, nothing is recorded. On exit, the previous
    handlers are restored, including those set from C. If the system has no `sigaction`, handlers set from C are not
    replaced. `is_answered` says whether the first signal is answered with a message.
    """
    interrupts = Interrupts(is_answered)
    with _handled(_SIGNALS, interrupts.receive):
        yield interrupts


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `KeyboardInterrupt` in a block, as Ctrl-C does, unless they have a handler."""
    numbers = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    with _handled(numbers, _stop):
        yield


def _stop(number: int, frame: FrameType | None) -> None:
    if number == _HANGUP:
        _leave_terminal()
    raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Discard what this process writes to a terminal from now on, because writing to a closed terminal is an error."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(null, descriptor)
        os.close(null)


@contextlib.contextmanager
def _handled(numbers: Iterable[int], receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a handler for the given signals within a block, and restore the previous handlers afterwards."""
    before = {}
    try:
        for number in numbers if threading.current_thread() is threading.main_thread() else ():
            handler, action = signal.getsignal(number), _action(number)
            if handler is not signal.SIG_IGN and (handler is not None or action is not None):
                before[number] = (handler, action)
                signal.signal(number, receive)
        yield
    finally:
        for number, (handler, action) in before.items():
            # for a handler set from C, Python will report SIG_DFL even after the C action is restored
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            if action is not None:
                _sigaction(number, action, None)


def _action(number: int) -> _Action | None:
    """Return the C-level action for a signal, or None if the action cannot be read."""
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    return action if _sigaction(number, None, action) else None


def _sigaction(number: int, new: _Action | None, old: _Action | None) -> bool:
    """Call the C library's `sigaction` to set or read a signal's action; return whether the call succeeded."""
    try:
        call = ctypes.CDLL(None).sigaction
    except (AttributeError, OSError, TypeError):  # Windows has no `sigaction`
        return False
    return call(int(number), new, old) == 0
