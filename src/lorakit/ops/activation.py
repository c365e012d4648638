"""MLP activations and their gradients, with torch's kernels, except that on a CPU, GELU's tanh form uses a sigmoid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ops.adapted import scratch_like, slabs, upcast_scratch
from lorakit.ops.kernels import kernels_for

aten = torch.ops.aten

SLOPE = 2 * math.sqrt(2 / math.pi)
"""Slope of g at 0, where x·σ(g(x)) is the tanh approximation of GELU."""
QUICK = 1.702
"""Coefficient of x inside the sigmoid of "quick GELU", x·σ(1.702·x)."""


@dataclass(frozen=True)
class Activation:
    """An entry of ACTIVATIONS: `value(x, out)` writes act(x) (N, f), and `gradient(dy, x, out)` dy·act'(x)."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def gelu_tanh(x: Tensor, out: Tensor) -> Tensor:
    """Write the tanh approximation of GELU for rows x (N, f) to `out` (N, f) and return `out`. [docs/math.md (78)] On a
    CPU, it is x times a sigmoid, four times as fast as torch's tanh, in fp32 or wider, one slab of rows at a time.
    """
    if x.device.type != "cpu":
        return aten.gelu.out(x, approximate="tanh", out=out)
    inputs, gates = upcast_scratch(x), scratch_like(x)
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
        lambda x, out: aten.silu.out(x, out=out),
        lambda dy, x, out: aten.silu_backward.grad_input(dy, x, grad_input=out),
    ),
    "gelu": Activation(
        "gelu",
        lambda x, out: aten.gelu.out(x, out=out),
        lambda dy, x, out: aten.gelu_backward.grad_input(dy, x, grad_input=out),
    ),
    "gelu_tanh": Activation(
        "gelu_tanh",
        gelu_tanh,
        lambda dy, x, out: aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=out),
    ),
    "quick_gelu": Activation(
        "quick_gelu", _quick_gelu, lambda dy, x, out: aten.silu_backward.grad_input(dy, x * QUICK, grad_input=out)
    ),
    "relu": Activation(
        "relu",
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda dy, x, out: aten.threshold_backward.grad_input(dy, x, 0, grad_input=out),
    ),
}
"""Activations by name. "gelu_tanh" is also known as "gelu_new" or "gelu_pytorch_tanh", and "silu" as "swish"."""


def activation(name: str) -> Activation:
    """Return the activation with this name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"no fused form of activation {name!r}; available: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activate(act: Activation, first: Tensor, up: Tensor | None, out: Tensor) -> Tensor:
    """Write act(first)·up, or act(first) if `up` is None, to `out`; return `out`. All tensors are contiguous (N, f)."""
    kernels = kernels_for(first, up)
    if kernels is None or act.name not in kernels.activations:
        act.value(first, out)
        return out if up is None else out.mul_(up)
    kernels.gate(act.name, first, up, out)
    return out


def activate_backward(act: Activation, da: Tensor, first: Tensor, up: Tensor | None) -> list[Tensor]:
    """Overwrite da (N, f), the gradient of `activate`, with that of `first`; return it and, if given, that of `up`."""
    kernels, dup = kernels_for(first, up, da), None if up is None else torch.empty_like(first)
    if kernels is not None and act.name in kernels.activations:
        kernels.gate_backward(act.name, da, first, up, da, dup)
    else:
        if up is not None and dup is not None:
            act.value(first, dup).mul_(da)
            da.mul_(up)
        act.gradient(da, first, da)
    return [da] if dup is None else [da, dup]
