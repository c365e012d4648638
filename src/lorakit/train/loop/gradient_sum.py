"""The sum of a step's gradients over the processes, which starts while the last backward pass still runs.

The trainable tensors are divided into buckets, from the last tensor to the first, because a backward pass computes
gradients in about this order. When all gradients of a bucket exist, they are copied into its flat buffer, and its sum
starts; meanwhile, autograd computes the gradients of the next bucket. All processes have the same buckets and send them
in the same order, whichever gradients they have: one that a process lacks counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.errors import RunError
from lorakit.plan.parallel import BUCKET_BYTES
from lorakit.train.loop.optimizer import Named
from lorakit.train.processes.processes import Processes

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_ALIGNED = 16
"""Each tensor of a flat buffer starts at a multiple of this number of elements, so that kernels see aligned memory."""


@dataclass
class _Bucket:
    """Trainable tensors of one dtype whose gradients are summed together.

    Attributes:
        parameters: The tensors (any shape).
        missing: Those without a final gradient.
        wait: Function that waits for the end of the sum, once it has started.
    """

    parameters: list[nn.Parameter]
    missing: set[nn.Parameter] = field(default_factory=set)
    wait: Callable[[], None] | None = None


class GradientSum:
    """Sums the gradients of one step over all processes, whose trainable tensors are the same.

    Use it as a context manager around the forward and backward passes of the step. At the end of the block, also after
    an error, what was not sent yet is sent, so that no other process waits for it. Then call `received`.
    """

    def __init__(self, named: Named, processes: Processes) -> None:
        self._processes = processes
        self._parameters = [] if processes.is_alone else [parameter for _, parameter in named]
        self._buckets = _buckets(self._parameters)
        self._home = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._waiting = list(reversed(self._buckets))
        self._sent: dict[nn.Parameter, bool] = {}

    @property
    def has_gradient(self) -> list[bool]:
        """For each tensor, whether this process computed a gradient; known after the block."""
        return [self._sent[parameter] for parameter in self._parameters]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if cause is not None and self._processes.in_lockstep:
            return  # the others notice that this process ends
        while self._waiting:
            self._send_next()

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Send each bucket as soon as it is complete, within a block with this process's last backward pass."""
        for bucket in self._buckets:
            bucket.missing.update(bucket.parameters)
        hooks = [parameter.register_post_accumulate_grad_hook(self._completed) for parameter in self._parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def received(self, has_gradient: Sequence[bool]) -> None:
        """Wait for the sums, which replace `.grad`; a tensor without a gradient in any process keeps none.

        Raises:
            RunError: Another process ended.
        """
        for bucket in self._buckets:
            if bucket.wait is not None:
                bucket.wait()
        for parameter, is_trained in zip(self._parameters, has_gradient, strict=True):
            if not is_trained:
                parameter.grad = None

    def _completed(self, parameter: torch.Tensor) -> None:
        """Note a gradient, and send the buckets that are now complete; a hook of the backward pass."""
        bucket = self._home[parameter]  # type: ignore[index]
        if bucket.wait is not None:
            raise RunError(
                f"the gradient of a trainable tensor of shape {tuple(parameter.shape)} was computed twice in one "
                "backward pass, after it was sent to the other processes; train in one process.",
                what=tuple(parameter.shape),
                field="nproc",
            )
        bucket.missing.discard(parameter)
        while self._waiting and not self._waiting[-1].missing:
            self._send_next()

    def _send_next(self) -> None:
        """Start the sum of the next bucket, whose buffer takes the place of its gradients."""
        bucket = self._waiting.pop()
        self._sent.update((parameter, parameter.grad is not None) for parameter in bucket.parameters)
        buffer, parts = _flat(bucket.parameters)
        with torch.no_grad():
            for parameter, part in zip(bucket.parameters, parts, strict=True):
                if parameter.grad is not None:
                    part.copy_(parameter.grad)
                parameter.grad = part
        bucket.wait = self._processes.start_sum(buffer)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[_Bucket]:
    """Divide tensors into buckets, from the last tensor to the first."""
    full, filling = list[_Bucket](), dict[torch.dtype, list[nn.Parameter]]()
    for parameter in reversed(parameters):
        members = filling.setdefault(parameter.dtype, [])
        members.append(parameter)
        if sum(member.nbytes for member in members) >= BUCKET_BYTES:
            full.append(_Bucket(filling.pop(parameter.dtype)))
    return [*full, *map(_Bucket, filling.values())]


def _flat(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a flat buffer of zeros for tensors of one dtype, on one device, and a view of it for each tensor."""
    *starts, end = accumulate((-(-tensor.numel() // _ALIGNED) * _ALIGNED for tensor in tensors), initial=0)
    buffer = tensors[0].new_zeros(end)
    pairs = zip(tensors, starts, strict=True)
    return buffer, [buffer[start : start + tensor.numel()].view(tensor.shape) for tensor, start in pairs]
