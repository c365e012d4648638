"""The processes of a run: their number, what they exchange, and errors that end all of them.

`joined` starts the process group (`torch.distributed`) that a launcher prepared, and yields this process's `Processes`;
everything else asks that object. A single process has no group, and each method returns at once.

Values and errors are exchanged by one operation, `exchange`, in which all processes take part. A process that fails
sends its error in place of the value, whatever the others are exchanging, so that all of them raise it. Tensors are
exchanged only after an `exchange` in which no process has failed. Sums that run while other operations do have a
separate group, so that only the order of the sums must be the same in all processes.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import torch

from lorakit.errors import LorakitError, RunError, UsageError
from lorakit.train.processes.connecting import connect
from lorakit.train.processes.failures import Failure, Notices, is_of_group
from lorakit.train.processes.launching import PATIENCE, PROCESS_ENDED, Launched, job_of, restarts_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_ALIGNED = 16
"""Numbers to a multiple of which each tensor of a flat buffer starts, so that kernels see aligned memory."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen by one of them.

    Attributes:
        rank: Number of this process, from 0; process 0 alone prints and writes.
        count: Number of processes.
        local_rank: Number of this process among those on the same machine, from 0.
        restarts: Number of times that a launcher has started the processes again.
        job: Name of the launcher's job, which stays the same after a restart; "" without such a launcher.
        in_lockstep: Whether all processes must run the model equally often, because they gather its weights together
            (`sharding`). A process that fails then cannot wait for the others, which wait for its part of a weight.
        notices: What the processes tell each other without an exchange.
        sums: The group in which sums of tensors run; None is the group of all other operations.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    restarts: int = 0
    job: str = ""
    in_lockstep: bool = False
    notices: Notices = field(default_factory=Notices, repr=False, compare=False)
    sums: ProcessGroup | None = field(default=None, repr=False, compare=False)
    _shared: list[BaseException] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
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
        found = self._gather((value, None))
        failed = [(rank, failure) for rank, (_, failure) in enumerate(found) if failure is not None]
        if failed:
            rank, failure = failed[0]
            self._raise(failure.error(rank))
        return [cast(T, one) for one, _ in found]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end of a block, and raise in all of them what one of them raised.

        Raises:
            LorakitError: The block failed in another process, or another process ended.
        """
        try:
            yield
        except Exception as cause:
            if self.is_alone or self.has_shared(cause):
                raise
            if self.in_lockstep and isinstance(cause, RuntimeError) and is_of_group(cause):
                self._raise_lost(cause)  # the consequence of another process's error
            self._shared.append(cause)
            if self.in_lockstep:
                self.notices.leave(self.rank, Failure.of(cause))
            else:
                self._gather((None, Failure.of(cause)))
            raise
        self.exchange(None)

    def has_shared(self, cause: BaseException) -> bool:
        """Return whether all processes know of an error or of its cause, or this process can no longer tell them."""
        known: BaseException | None = cause
        while known is not None and not any(known is one for one in self._shared):
            known = known.__cause__
        return known is not None

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what a function returns in process 0; the other processes wait and do not call it.

        Args:
            make: Function whose result can be pickled.

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
        """Check that all processes have the same values.

        Args:
            values: Name -> value, which is compared as text.

        Raises:
            UsageError: A value differs; the message names it, and gives two values with their processes.
        """
        found = self.exchange({name: str(value) for name, value in values.items()})
        for rank, other in enumerate(found):
            for name in sorted({*found[0], *other}):
                here, there = found[0].get(name), other.get(name)
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

        def wait() -> None:
            self._guarded(work.wait)

        return wait

    def from_first_in_place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace the values of tensors by those in process 0.

        Args:
            tensors: Tensors of any shape, with the same shapes and dtypes in every process.

        Raises:
            RunError: Another process ended.
        """
        if self.is_alone:
            return
        from torch import distributed

        buffers, parts = flat_parts(tensors)
        with torch.no_grad():
            for part, tensor in zip(parts, tensors, strict=True):
                part.copy_(tensor)
            for buffer in buffers:
                self._guarded(lambda buffer=buffer: distributed.broadcast(buffer, 0))  # type: ignore[misc]
            for part, tensor in zip(parts, tensors, strict=True):
                tensor.copy_(part)

    def _gather(self, value: tuple[object, Failure | None]) -> list[tuple[object, Failure | None]]:
        from torch import distributed

        found: list[tuple[object, Failure | None]] = [(None, None)] * self.count
        self._guarded(lambda: distributed.all_gather_object(found, value))
        return found

    def _guarded(self, call: Callable[[], T]) -> T:
        """Call an operation of the group; if it fails, another process has ended."""
        try:
            return call()
        except RuntimeError as cause:
            self._raise_lost(cause)

    def _raise_lost(self, cause: RuntimeError) -> NoReturn:
        """Raise the error that another process has left before it ended, or one that says that it ended."""
        left = self.notices.left()
        if left is not None:
            self._raise(left)
        text = "another process ended or can no longer be reached, so the run cannot go on."
        self._raise(RunError(text, what=" ".join(str(cause).split()), field=PROCESS_ENDED))

    def _raise(self, error: LorakitError) -> NoReturn:
        self._shared.append(error)
        raise error


ALONE = Processes()
"""A single process."""


def flat_parts(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return a flat buffer of zeros for each dtype of some tensors, and a view of a buffer for each tensor.

    Args:
        tensors: Tensors of any shape, on one device.

    Returns:
        The 1-D buffers, and the views, which have the shapes and dtypes of the tensors.
    """
    places, sizes = list[int](), dict[torch.dtype, int]()
    for tensor in tensors:
        places.append(sizes.get(tensor.dtype, 0))
        sizes[tensor.dtype] = places[-1] + -(-tensor.numel() // _ALIGNED) * _ALIGNED
    device = tensors[0].device if tensors else "cpu"
    flat = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
    parts = [
        flat[tensor.dtype][place : place + tensor.numel()].view(tensor.shape)
        for tensor, place in zip(tensors, places, strict=True)
    ]
    return list(flat.values()), parts


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

    is_available = distributed.is_available()
    job, restarts = job_of(os.environ), restarts_of(os.environ)
    if is_available and distributed.is_initialized():
        rank, count = distributed.get_rank(), distributed.get_world_size()
        held = Processes(rank, count, int(os.environ.get("LOCAL_RANK", rank)), restarts, job)
        with _with_sums(_with_restarts(held)) as processes:
            yield processes
        return
    launched = Launched.of(os.environ)
    if launched.count == 1:
        yield Processes(restarts=restarts, job=job)
        return
    if not is_available:
        raise UsageError(
            f"WORLD_SIZE is {launched.count}, but this build of torch has no torch.distributed; start one process.",
            what=launched.count,
            field="WORLD_SIZE",
        )
    store = connect(launched, seconds)
    try:
        held = Processes(launched.rank, launched.count, launched.local_rank, restarts, job, notices=Notices(store))
        with _with_sums(_with_restarts(held)) as processes:
            yield processes
    except BaseException as cause:
        traceback.clear_frames(cause.__traceback__)  # a sharded model refers to the group
        raise
    finally:
        gc.collect()  # a group that still exists when the interpreter ends can abort the process
        distributed.destroy_process_group()


def _with_restarts(processes: Processes) -> Processes:
    """Return the processes with the largest number of restarts: that of the machine on which a process had ended."""
    return replace(processes, restarts=max(processes.exchange(processes.restarts)))


@contextmanager
def _with_sums(processes: Processes) -> Iterator[Processes]:
    """Add the group in which sums of tensors run, for a block."""
    from torch import distributed

    group = distributed.new_group()
    try:
        yield replace(processes, sums=group)
    finally:
        distributed.destroy_process_group(group)
