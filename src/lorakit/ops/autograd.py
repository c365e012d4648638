"""Context of autograd functions, state of autocast, and inputs as rows, for all fused operations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


class Context(Protocol[State]):
    """The context that PyTorch passes to the forward and the backward of an autograd function.

    Attributes:
        needs_input_grad: Whether each argument of the forward needs a gradient.
        saved_tensors: The arguments of `save_for_backward`.
        state: Everything else that the forward leaves for the backward.
    """

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]
    state: State

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save inputs and outputs, and intermediate tensors of any shape."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Declare inputs (any shape) that the forward changed in place."""

    def set_materialize_grads(self, value: bool) -> None:
        """Set whether the backward gets zeros, instead of None, for outputs without a gradient."""


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether gradients are recorded and one of these tensors (any shape) requires one."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(x: Tensor) -> Tensor:
    """Cast x (any shape) to autocast's dtype if autocast is enabled; float64 is left unchanged, as autocast does."""
    device = x.device.type
    on = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if on else x


def is_cast_by_autocast(x: Tensor) -> bool:
    """Return whether autocast is enabled with a dtype other than that of x (any shape)."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of x (any shape), for operations that cast explicitly."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def rows(x: Tensor) -> Tensor:
    """Return x (…, in) as contiguous rows (N, in); a view if possible."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def unflat(y: Tensor, like: Tensor) -> Tensor:
    """Reshape rows y (N, out) to the leading dimensions of `like` (…, in)."""
    return y.view(*like.shape[:-1], y.shape[-1])
