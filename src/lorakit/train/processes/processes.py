"""The processes of a run: their number, what they exchange, and errors that end all of them.

Values and errors are exchanged by one operation, `exchange`, in which all processes take part. A process that fails
sends its error in place of the value, whatever the others are exchanging, so that all of them raise it. Tensors are
exchanged only after an `exchange` in which no process has failed. Sums that run while other operations do have a
separate group, so that only the order of the sums must be the same in all processes.

`joined` starts the group of processes that a launcher prepared. A process that cannot wait for the others leaves its
error in the store through which they have found each other, which outlives all processes but the first.
"""

from __future__ import annotations

import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import torch

from lorakit.errors import LorakitError, RunError, UsageError, describe
from lorakit.train.processes.launching import PATIENCE, PROCESS_ENDED, Launched, connect, job_of, restarts_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_FAILED, _REPORTING = "lorakit/failed", "lorakit/reporting"  # keys in the store
_REPORT_SECONDS = 10


@dataclass(eq=False)
class Processes:
    """The processes of a run, as seen by one of them; a single process has no group, and each method returns at once.

    Attributes:
        rank: Number of this process, from 0; process 0 alone prints and writes.
        count: Number of processes.
        local_rank: Number of this process among those on the same machine, from 0.
        restarts: Number of times that a launcher has started the processes again.
        job: Name of the launcher's job, which stays the same after a restart; "" without such a launcher.
        in_lockstep: Whether all processes must run the model equally often, because they gather its weights together
            (`sharding`). A process that fails then cannot wait for the others, which wait for its part of a weight.
        store: The store; None if there is a single process or another library has connected the processes.
        sums: The group in which sums of tensors run; None is the group of all other operations.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    restarts: int = 0
    job: str = ""
    in_lockstep: bool = False
    store: Store | None = field(default=None, repr=False)
    sums: ProcessGroup | None = field(default=None, repr=False)
    _shared: list[BaseException] = field(default_factory=list, repr=False)

    @property
    def is_alone(self) -> bool:
        """Return whether this is the only process."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Return whether this process prints and writes."""
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; every process must call this equally often.

        Args:
            value: This process's value, which is pickled.

        Raises:
            LorakitError: Another process failed, with its error; or it ended.
        """
        if self.is_alone:
            return [value]
        pairs = self._gather((value, None))
        for _, error in pairs:
            if error is not None:
                self._raise(error)
        return [cast(T, one) for one, _ in pairs]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end of a block, and raise in all of them what one of them raised.

        Raises:
            LorakitError: The block failed in another process, or another process ended.
        """
        try:
            yield
        except Exception as cause:
            if self.is_alone or self._has_shared(cause):
                raise
            if self.in_lockstep and isinstance(cause, RuntimeError) and _is_of_group(cause):
                self._raise_lost(cause)  # the consequence of another process's error
            self._shared.append(cause)
            if self.in_lockstep:
                self._leave(self._error_elsewhere(cause))
            else:
                self._gather((None, self._error_elsewhere(cause)))
            raise
        self.exchange(None)

    def _has_shared(self, cause: BaseException) -> bool:
        """Return whether all processes know of an error or of its cause, or this process can no longer tell them."""
        known: BaseException | None = cause
        while known is not None and not any(known is one for one in self._shared):
            known = known.__cause__
        return known is not None

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what a function returns in process 0, which is pickled; the other processes wait and do not call it.

        Raises:
            LorakitError: The function failed, or another process did.
        """
        if self.is_alone:
            return make()
        return cast(T, self.exchange(make() if self.is_first else None)[0])

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        return any(self.exchange(flag))

    def check_equal(self, values: Mapping[str, object]) -> None:
        """Check that all processes have the same values, by name, which are compared as text.

        Raises:
            UsageError: A value differs; the message names it, and gives two values with their processes.
        """
        by_rank = self.exchange({name: str(value) for name, value in values.items()})
        for rank, other in enumerate(by_rank):
            for name in sorted({*by_rank[0], *other}):
                here, there = by_rank[0].get(name), other.get(name)
                if here != there:
                    raise UsageError(
                        f"{name} is {here or 'missing'} in process 0, but {there or 'missing'} in process {rank}; all "
                        "processes of a run need the same data, settings and package versions.",
                        what=there,
                        field=name,
                    )

    def start_sum(self, buffer: torch.Tensor) -> Callable[[], None]:
        """Start to replace the values of a tensor by their sums over all processes, and do not wait for the end.

        Args:
            buffer: Tensor of any shape, with the same shape and dtype in every process.

        Returns:
            Function that waits for the end, or raises RunError if another process ended.

        Raises:
            RunError: Another process ended.
        """
        from torch import distributed

        work = self._guarded(lambda: distributed.all_reduce(buffer, group=self.sums, async_op=True))
        return lambda: self._guarded(work.wait)

    def from_first_in_place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace the values of tensors, of the same shapes and dtypes in every process, by those in process 0.

        Raises:
            RunError: Another process ended.
        """
        if self.is_alone:
            return
        from torch import distributed

        with torch.no_grad():
            for tensor in tensors:
                values = tensor.contiguous()
                self._guarded(lambda values=values: distributed.broadcast(values, 0))  # type: ignore[misc]
                tensor.copy_(values)

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

    def _error_elsewhere(self, cause: Exception) -> LorakitError:
        """Return what the other processes raise for an error in this one."""
        if isinstance(cause, LorakitError) and type(cause).__module__ == LorakitError.__module__:
            return type(cause)(f"process {self.rank}: {cause}", **cause.fields)
        return RunError(f"process {self.rank}: unexpected {describe(cause)}", what=type(cause).__name__)

    def _leave(self, error: LorakitError) -> None:
        """Leave an error where the other processes find it after this one has ended."""
        if self.store is not None:
            with suppress(RuntimeError):  # the first process has ended, and with it the store
                self.store.set(_FAILED, pickle.dumps(error))  # type: ignore[arg-type] # torch takes bytes too

    def _left(self) -> LorakitError | None:
        """Return the error that another process has left, or None."""
        with suppress(RuntimeError):  # the first process has ended, and with it the store
            if self.store is not None and self.store.check([_FAILED]):
                return cast(LorakitError, pickle.loads(self.store.get(_FAILED)))
        return None

    def _gather(self, value: tuple[object, LorakitError | None]) -> list[tuple[object, LorakitError | None]]:
        from torch import distributed

        pairs: list[tuple[object, LorakitError | None]] = [(None, None)] * self.count
        self._guarded(lambda: distributed.all_gather_object(pairs, value))
        return pairs

    def _guarded(self, call: Callable[[], T]) -> T:
        """Call an operation of the group; if it fails, another process has ended."""
        try:
            return call()
        except RuntimeError as cause:
            self._raise_lost(cause)

    def _raise_lost(self, cause: RuntimeError) -> NoReturn:
        """Raise the error that another process has left before it ended, or one that says that it ended."""
        text = "another process ended or can no longer be reached, so the run cannot go on."
        self._raise(self._left() or RunError(text, what=" ".join(str(cause).split()), field=PROCESS_ENDED))

    def _raise(self, error: LorakitError) -> NoReturn:
        self._shared.append(error)
        raise error


ALONE = Processes()
"""A single process."""


def _is_of_group(cause: Exception) -> bool:
    """Return whether an operation of torch.distributed raised an error, which it does if another process is gone."""
    trace = cause.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = None if trace is None else trace.tb_frame.f_globals.get("__name__")
    return str(where).startswith("torch.distributed.")


@contextmanager
def joined(seconds: float = PATIENCE) -> Iterator[Processes]:
    """Start the process group that the launcher prepared, if there are several processes, and end it after a block.

    A group that was already started, for example by another library, is used and not ended.

    Args:
        seconds: Limit of the wait for the other processes, at the start and in each operation.

    Yields:
        This process among the others.

    Raises:
        UsageError: The launcher's variables are incomplete.
        RunError: The processes cannot reach each other.
    """
    from torch import distributed

    job, restarts = job_of(os.environ), restarts_of(os.environ)
    if distributed.is_available() and distributed.is_initialized():
        rank, count = distributed.get_rank(), distributed.get_world_size()
        processes = Processes(rank, count, int(os.environ.get("LOCAL_RANK", rank)), restarts, job)
        _agree(processes)
        try:
            yield processes
        finally:
            distributed.destroy_process_group(processes.sums)
        return
    launched = Launched.of(os.environ)
    processes = Processes(launched.rank, launched.count, launched.local_rank, restarts, job)
    if processes.is_alone:
        yield processes
        return
    if not distributed.is_available():
        raise UsageError(
            f"WORLD_SIZE is {launched.count}, but this build of torch has no torch.distributed; start one process.",
            what=launched.count,
            field="WORLD_SIZE",
        )
    processes.store = connect(launched, seconds)
    try:
        _agree(processes)
        yield processes
    except BaseException as cause:
        traceback.clear_frames(cause.__traceback__)  # a sharded model refers to the group
        raise
    finally:
        processes.sums = None
        gc.collect()  # a group that still exists when the interpreter ends can abort the process
        distributed.destroy_process_group()


def _agree(processes: Processes) -> None:
    """Take the restarts of the machine on which a process had ended, and add the group in which sums run."""
    from torch import distributed

    processes.restarts = max(processes.exchange(processes.restarts))
    processes.sums = distributed.new_group()
