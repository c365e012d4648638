"""Helpers for the fused operations: a typed autograd context, autocast handling, and reshaping to and from rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


class Context(Protocol[State]):
    """Type of the context that PyTorch passes to the forward and backward methods of an autograd function.

    Attributes:
        needs_input_grad: For each argument of the forward method, whether it needs a gradient.
        saved_tensors: Tensors that were passed to `save_for_backward`.
        state: Other data that the forward method stores for the backward method.
    """

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]
    state: State

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save inputs, outputs or intermediate results of any shape for the backward pass."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Mark inputs (any shape) as modified in place by the forward method."""

    def set_materialize_grads(self, value: bool) -> None:
        """Set whether the backward method receives zeros, rather than None, for outputs without a gradient."""


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
