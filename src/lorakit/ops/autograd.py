"""Helpers for the fused operations: typed autograd functions, autocast handling, and reshaping to and from rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

State = TypeVar("State")


class Context(Protocol[State]):
    """Context that PyTorch passes to an autograd function; `state` is what forward stores besides tensors."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]
    state: State

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save inputs, outputs or intermediate results of any shape for the backward pass."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Mark inputs (any shape) as modified in place by the forward method."""

    def set_materialize_grads(self, value: bool) -> None:
        """Set whether the backward method receives zeros, rather than None, for outputs without a gradient."""


def is_traced() -> bool:
    """Return whether tensors may be symbolic, batched or dual: in tracing, export, torch.func and forward-mode AD."""
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return True
    return torch._C._get_tracing_state() is not None


Replayed = tuple[Sequence[Tensor | None], Sequence[Tensor]]
"""Aliases of the inputs, in the order of the arguments of the forward method, and the outputs."""

Replay = Callable[[Any, Sequence[Any]], Replayed]
"""Function of the context and the saved tensors that computes the outputs again with PyTorch's operations."""

Backward = Callable[..., tuple[Tensor | None, ...]]


def with_replay(replay: Replay) -> Callable[[Backward], Backward]:
    """Return a decorator that makes a backward method differentiable, although autograd cannot record it.

    If it is itself recorded (`create_graph`) or transformed (`is_grads_batched`), the gradients are those of `replay`,
    so that their own gradients are complete. torch's `once_differentiable` makes them constants.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or is_traced()):
                return backward(ctx, *gradients)
            return _replayed(ctx, replay, gradients)

        return run

    return decorate


def _replayed(ctx: Any, replay: Replay, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    is_recorded = torch.is_grad_enabled()
    first = next(dy for dy in gradients if dy is not None)
    with torch.enable_grad(), without_autocast(first):
        inputs, outputs = replay(ctx, ctx.saved_tensors)
        needed = [(i, x) for i, x in enumerate(inputs) if x is not None and ctx.needs_input_grad[i]]
        pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if dy is not None and y.requires_grad]
        ys, dys = zip(*pairs, strict=True)
        xs = [x for _, x in needed]
        of_needed = torch.autograd.grad(ys, xs, dys, create_graph=is_recorded, allow_unused=True)
    of_all: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for (i, _), gradient in zip(needed, of_needed, strict=True):
        of_all[i] = gradient
    return tuple(of_all)


def alias(x: Tensor) -> Tensor:
    """Return x (any shape) as a new node of the autograd graph, so that its gradient excludes other uses of x."""
    return x.view_as(x) if x.requires_grad else x


def edge_of(x: Tensor) -> Tensor | None:
    """Return zeros without storage, shaped like x (any shape), whose gradient flows to x; None if x needs none. A fused
    operation that does not save x saves this tensor, so that a replay is connected to x.
    """
    edge: Tensor | None = _Edge.apply(x) if x.requires_grad else None
    return edge


def entered(x: Tensor | None, edge: Tensor | None, shape: torch.Size, like: tuple[torch.dtype, torch.device]) -> Tensor:
    """Return the input (any shape) of a replay: x, its edge, or zeros, on which the gradients do not depend."""
    known = edge if x is None else x
    if known is not None:
        return alias(known)
    return torch.zeros(shape, dtype=like[0], device=like[1], requires_grad=True)


class _Edge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd is recording and any of the tensors (of any shape) requires a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_cast_by_autocast(x: Tensor) -> bool:
    """Return whether autocast would cast x (any shape); it never casts float64."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype not in (torch.get_autocast_dtype(device), torch.float64)


def autocast(x: Tensor) -> Tensor:
    """Cast x (any shape) as autocast would."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_cast_by_autocast(x) else x


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context manager that disables autocast on the device of x (any shape) for code that casts explicitly."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def rows(x: Tensor) -> Tensor:
    """Return x (…, in) as contiguous rows (N, in), using a view if possible."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def unflat(y: Tensor, like: Tensor) -> Tensor:
    """Reshape y (N, out) to (…, out), with the leading dimensions of `like` (…, in)."""
    return y.view(*like.shape[:-1], y.shape[-1])
