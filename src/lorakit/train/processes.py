"""The processes of a run: their number, what they exchange, and errors that end all of them.

`joined` starts the process group (`torch.distributed`) that a launcher prepared, and yields this process's `Processes`;
everything else asks that object. A single process has no group, and each method returns at once.

Values and errors are exchanged by one operation, `exchange`, in which all processes take part. A process that fails
sends its error in place of the value, whatever the others are exchanging, so that all of them raise it. Tensors are
exchanged only after an `exchange` in which no process has failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import torch

import lorakit.errors
from lorakit.errors import LorakitError, NotYetSupported, RunError, UsageError
from lorakit.train.launching import PROCESS_ENDED, Launched

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_FAILED = "lorakit/failed"
"""Key under which a process stores its error before it ends."""

_ALIGNED = 16
"""Numbers to a multiple of which each tensor of a flat buffer starts, so that kernels see aligned memory."""


@dataclass(frozen=True)
class _Failure:
    """An error of another process: its class in `lorakit.errors`, its message and its fields."""

    kind: str
    message: str
    fields: Mapping[str, object]

    @classmethod
    def of(cls, cause: Exception) -> _Failure:
        kind = type(cause).__name__
        if isinstance(cause, LorakitError) and hasattr(lorakit.errors, kind):
            return cls(kind, str(cause), cause.fields)
        text = " ".join(str(cause).split()) or "no message"
        return cls("RunError", f"unexpected {kind}: {text}", {"what": kind, "field": None})

    def error(self, rank: int) -> LorakitError:
        kind: type[LorakitError] = getattr(lorakit.errors, self.kind)
        return kind(f"process {rank}: {self.message}", **self.fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen by one of them.

    Attributes:
        rank: Number of this process, from 0; process 0 alone prints and writes.
        count: Number of processes.
        local_rank: Number of this process among those on the same machine, from 0.
        in_lockstep: Whether all processes must run the model equally often, because they gather its weights together
            (`sharding`). A process that fails then cannot wait for the others, which wait for its part of a weight.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    in_lockstep: bool = False
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
            if self.in_lockstep:
                self._publish(cause)
            self._shared.append(cause)
            if not self.in_lockstep:
                self._gather((None, _Failure.of(cause)))
            raise
        self.exchange(None)

    def has_shared(self, cause: BaseException) -> bool:
        """Return whether all processes know of an error, or this process can no longer tell them."""
        return any(cause is one for one in self._shared)

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

    def sum(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums of tensors over all processes; tensors of one dtype share a flat buffer.

        Args:
            tensors: Tensors of any shape, with the same shapes and dtypes in every process.

        Returns:
            New tensors: parts of the buffers.

        Raises:
            RunError: Another process ended.
        """
        from torch import distributed

        return self._by_buffer(tensors, distributed.all_reduce)

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

        with torch.no_grad():
            for tensor, value in zip(
                tensors, self._by_buffer(tensors, lambda flat: distributed.broadcast(flat, 0)), strict=True
            ):
                tensor.copy_(value)

    def _by_buffer(
        self, tensors: Sequence[torch.Tensor], operation: Callable[[torch.Tensor], object]
    ) -> list[torch.Tensor]:
        """Copy tensors into a flat buffer for each dtype, apply an operation to the buffers, and return the parts."""
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
        with torch.no_grad():
            for part, tensor in zip(parts, tensors, strict=True):
                part.copy_(tensor)
            for buffer in flat.values():
                self._guarded(lambda buffer=buffer: operation(buffer))  # type: ignore[misc]
        return parts

    def _gather(self, value: tuple[object, _Failure | None]) -> list[tuple[object, _Failure | None]]:
        from torch import distributed

        found: list[tuple[object, _Failure | None]] = [(None, None)] * self.count
        self._guarded(lambda: distributed.all_gather_object(found, value))
        return found

    def _guarded(self, call: Callable[[], object]) -> None:
        """Call an operation of the group; if it fails, another process has ended."""
        try:
            call()
        except RuntimeError as cause:
            self._raise_lost(cause)

    def _raise_lost(self, cause: RuntimeError) -> NoReturn:
        """Raise the error that another process has published before it ended, or one that says that it ended."""
        published = self._published() if self.in_lockstep else None
        if published is not None:
            rank, failure = published
            self._raise(failure.error(rank))
        text = "another process ended or can no longer be reached, so the run cannot go on."
        self._raise(RunError(text, what=" ".join(str(cause).split()), field=PROCESS_ENDED))

    def _publish(self, cause: Exception) -> None:
        """Leave an error where the other processes find it after this one has ended.

        Raises:
            LorakitError: The error is only the consequence of another process's, which is raised instead.
        """
        if isinstance(cause, RuntimeError) and _is_of_group(cause):
            self._raise_lost(cause)
        with contextlib.suppress(RuntimeError):  # the first process has ended, and with it the store
            _store().set(_FAILED, json.dumps([self.rank, dataclasses.asdict(_Failure.of(cause))], default=str))

    def _published(self) -> tuple[int, _Failure] | None:
        """Return the error that a process has published, and the number of the process, or None."""
        try:
            if not _store().check([_FAILED]):
                return None
            rank, values = json.loads(_store().get(_FAILED))
        except RuntimeError:  # the first process has ended, and with it the store
            return None
        return int(rank), _Failure(**values)

    def _raise(self, error: LorakitError) -> NoReturn:
        self._shared.append(error)
        raise error


def _is_of_group(cause: RuntimeError) -> bool:
    """Return whether an operation of torch.distributed raised an error, because another process is gone."""
    trace = cause.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("torch.distributed.")


def _store() -> Store:
    """Return the store through which the processes have found each other; it outlives all of them but the first."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


ALONE = Processes()
"""A single process."""


@contextmanager
def joined() -> Iterator[Processes]:
    """Start the process group that the launcher prepared, if there are several processes, and end it after a block.

    A group that was already started, for example by another library, is used and not ended.

    Yields:
        This process among the others.

    Raises:
        UsageError: The launcher's variables are incomplete.
        RunError: The processes cannot reach each other.
    """
    from torch import distributed

    is_available = distributed.is_available()
    if is_available and distributed.is_initialized():
        rank, count = distributed.get_rank(), distributed.get_world_size()
        yield Processes(rank, count, int(os.environ.get("LOCAL_RANK", rank)))
        return
    launched = Launched.of(os.environ)
    if launched.count == 1:
        yield ALONE
        return
    if not is_available:
        raise UsageError(
            f"WORLD_SIZE is {launched.count}, but this build of torch has no torch.distributed; start one process.",
            what=launched.count,
            field="WORLD_SIZE",
        )
    for name, value in launched.variables:
        os.environ[name] = value
    has_cuda = torch.cuda.is_available() and launched.local_rank < torch.cuda.device_count()
    if has_cuda:
        torch.cuda.set_device(launched.local_rank)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    except RuntimeError as cause:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"process {launched.rank} of {launched.count} cannot reach the others at {address} "
            f"({' '.join(str(cause).split())}); check that the port is free and that every process was started.",
            what=address,
            field="MASTER_PORT",
        ) from cause
    try:
        yield Processes(launched.rank, launched.count, launched.local_rank)
    except BaseException as cause:
        traceback.clear_frames(cause.__traceback__)  # a sharded model refers to the group
        raise
    finally:
        gc.collect()  # a group that still exists when the interpreter ends can abort the process
        distributed.destroy_process_group()


def check_parallel(parallel: str, fit: str | None, processes: Processes) -> None:
    """Check that lorakit can distribute a run in the requested way.

    Args:
        parallel: The setting `parallel`.
        fit: The setting `fit`.
        processes: The processes of the run.

    Raises:
        NotYetSupported: It cannot.
    """
    if fit is not None and parallel in ("fsdp", "hsdp"):
        raise NotYetSupported(
            f"fit is {fit!r}, but its measurement is not supported for a sharded base; omit --fit, or use "
            "--parallel ddp.",
            what=fit,
            field="fit",
        )
    if fit is not None and not processes.is_alone:
        raise NotYetSupported(
            f"fit is {fit!r}, but its measurement is not supported in {processes.count} processes; omit --fit, or "
            "use --memory-budget.",
            what=fit,
            field="fit",
        )
