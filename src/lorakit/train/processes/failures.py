"""Errors of one process, as the other processes learn of them.

A failure is sent in place of a value (`Processes.exchange`), or left in the store through which the processes of a run
have found each other, where it can be read after its process has ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import lorakit.errors
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_FAILED, _REPORTING = "lorakit/failed", "lorakit/reporting"  # keys in the store
_REPORT_SECONDS = 10


def describe(cause: BaseException) -> str:
    """Return the class and the message of an exception that lorakit did not raise, in one line."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split()) or 'no message'}"


@dataclass(frozen=True)
class Failure:
    """An error of another process: its class in `lorakit.errors`, its message and its fields."""

    kind: str
    message: str
    fields: Mapping[str, object]

    @classmethod
    def of(cls, cause: Exception) -> Failure:
        """Describe an error; one that lorakit did not raise becomes a RunError.

        Args:
            cause: The error.
        """
        kind = type(cause).__name__
        if isinstance(cause, LorakitError) and hasattr(lorakit.errors, kind):
            return cls(kind, str(cause), cause.fields)
        return cls("RunError", f"unexpected {describe(cause)}", {"what": kind, "field": None})

    def error(self, rank: int) -> LorakitError:
        """Return the error, to be raised in another process.

        Args:
            rank: Number of the process that failed.
        """
        kind: type[LorakitError] = getattr(lorakit.errors, self.kind)
        return kind(f"process {rank}: {self.message}", **self.fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Notices:
    """Messages that the processes of a run leave in their store, which outlives all of them but the first.

    Attributes:
        store: The store, or None if there is a single process or another library has connected the processes.
    """

    store: Store | None = None

    def announce_report(self) -> None:
        """Tell the other processes, from the first one, that it reports an error now."""
        if self.store is not None:
            with suppress(RuntimeError):  # the launcher that has the store may have ended
                self.store.set(_REPORTING, "1")

    def wait_for_report(self) -> bool:
        """Wait until the first process reports an error; a launcher stops it when another one exits.

        Returns:
            Whether the first process reports it; False if it has ended or does not answer.
        """
        if self.store is None:
            return True
        try:
            self.store.wait([_REPORTING], timedelta(seconds=_REPORT_SECONDS))
        except RuntimeError:
            return False
        time.sleep(1)  # it prints one line
        return True

    def leave(self, rank: int, failure: Failure) -> None:
        """Leave a failure where the other processes find it after this one has ended.

        Args:
            rank: Number of this process.
            failure: Its failure.
        """
        if self.store is not None:
            with suppress(RuntimeError):  # the first process has ended, and with it the store
                self.store.set(_FAILED, json.dumps([rank, asdict(failure)], default=str))

    def left(self) -> LorakitError | None:
        """Return the failure that another process has left, as an error, or None."""
        if self.store is None:
            return None
        try:
            if not self.store.check([_FAILED]):
                return None
            rank, values = json.loads(self.store.get(_FAILED))
        except RuntimeError:  # the first process has ended, and with it the store
            return None
        return Failure(**values).error(int(rank))


def is_of_group(cause: Exception) -> bool:
    """Return whether an operation of torch.distributed raised an error, which it does if another process is gone.

    Args:
        cause: The error, with its traceback.
    """
    trace = cause.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = None if trace is None else trace.tb_frame.f_globals.get("__name__")
    return isinstance(cause, RuntimeError) and str(where).startswith("torch.distributed.")
