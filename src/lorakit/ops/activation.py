"""Activations of MLPs: their values, and their gradients from the input alone, written into a tensor that is given.

Torch's own kernels, but for one whose sigmoid form takes a CPU less time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.adapted import room, room_to_widen, slabs
from lorakit.ops.kernels.choosing import kernels_for

aten = torch.ops.aten

SLOPE = 2 * math.sqrt(2 / math.pi)
"""Of the sigmoid in the approximate GELU, at 0."""
QUICK = 1.702
"""The same of "quick GELU", x·σ(1.702·x)."""


@dataclass(frozen=True)
class Activation:
    """One row of ACTIVATIONS.

    Attributes:
        name: Its own.
        reference: f in plain PyTorch, for autograd; any shape.
        value: `value(x, out)` writes f(x) of rows x (N, f) into out, and returns it.
        gradient: `gradient(dy, x, out)` writes dy·f'(x) into out, which may be dy, and returns it.
    """

    name: str
    reference: Callable[[Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def gelu_tanh(x: Tensor, out: Tensor) -> Tensor:
    """Write the approximate GELU of rows x (N, f) into out (N, f), as x times a sigmoid, [docs/math.md (78)].

    Torch's tanh takes a CPU four times as long as its sigmoid. Computed in fp32 or wider, some rows at a time.
    """
    if x.device.type != "cpu":
        return aten.gelu.out(x, approximate="tanh", out=out)
    inputs, gates = room_to_widen(x), room(x)
    for rows in slabs(x):
        part = x[rows] if inputs is None else inputs[: len(x[rows])].copy_(x[rows])
        gate = torch.mul(part, part, out=gates[: len(part)])
        gate.mul_(0.044715 * SLOPE).add_(SLOPE).mul_(part).sigmoid_()
        if inputs is None:
            torch.mul(gate, part, out=out[rows])
        else:
            out[rows].copy_(gate.mul_(part))
    return out


def _quick_gelu(x: Tensor, out: Tensor) -> Tensor:
    return aten.silu.out(x * QUICK, out=out).mul_(1 / QUICK)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(
        "silu",
        F.silu,
        lambda x, out: aten.silu.out(x, out=out),
        lambda dy, x, out: aten.silu_backward.grad_input(dy, x, grad_input=out),
    ),
    "gelu": Activation(
        "gelu",
        F.gelu,
        lambda x, out: aten.gelu.out(x, out=out),
        lambda dy, x, out: aten.gelu_backward.grad_input(dy, x, grad_input=out),
    ),
    "gelu_tanh": Activation(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        gelu_tanh,
        lambda dy, x, out: aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=out),
    ),
    "quick_gelu": Activation(
        "quick_gelu",
        lambda x: x * torch.sigmoid(QUICK * x),
        _quick_gelu,
        lambda dy, x, out: aten.silu_backward.grad_input(dy, x * QUICK, grad_input=out),
    ),
    "relu": Activation(
        "relu",
        F.relu,
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda dy, x, out: aten.threshold_backward.grad_input(dy, x, 0, grad_input=out),
    ),
}
"""Name -> activation. "gelu_tanh" is also known as "gelu_new" and "gelu_pytorch_tanh", "silu" as "swish"."""


def activation(name: str) -> Activation:
    """A row of ACTIVATIONS.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} has no fused form; those that have are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activate(act: Activation, first: Tensor, up: Tensor | None, out: Tensor) -> Tensor:
    """Write f(first)·up, or f(first) where there is no up, into out, and return it; all (N, f), contiguous."""
    kernels = kernels_for(first, up)
    if kernels is None or act.name not in kernels.activations:
        act.value(first, out)
        return out if up is None else out.mul_(up)
    kernels.gate(act.name, first, up, out)
    return out


def activate_backward(act: Activation, da: Tensor, first: Tensor, up: Tensor | None) -> list[Tensor]:
    """The gradients of `activate` for first, in the place of da, and for up where there is one; all (N, f)."""
    kernels, dup = kernels_for(first, up, da), None if up is None else torch.empty_like(first)
    if kernels is not None and act.name in kernels.activations:
        kernels.gate_backward(act.name, da, first, up, da, dup)
    else:
        if up is not None and dup is not None:
            act.value(first, dup).mul_(da)
            da.mul_(up)
        act.gradient(da, first, da)
    return [da] if dup is None else [da, dup]
