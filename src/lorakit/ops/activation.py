"""Activations of MLPs: their values, and their gradients from the input alone, written into a tensor that is given.

Torch's own kernels, but for two whose sigmoid form takes a CPU half the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.widening import room, room_to_widen, slabs

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One row of ACTIVATIONS.

    Attributes:
        reference: f in plain PyTorch, for autograd; any shape.
        value: `value(x, out)` writes f(x) of rows x (N, f) into out, and returns it.
        gradient: `gradient(dy, x, out)` writes dy·f'(x) into out, which may be dy, and returns it.
    """

    reference: Callable[[Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SigmoidGated:
    """f(x) = x·σ(k(x)) with k(x) = linear·x + cubic·x³, in fp32 or wider, some rows at a time, [docs/math.md (78)].

    Torch's tanh, which the other form of the approximate GELU needs, takes a CPU four times as long as its sigmoid.
    """

    linear: float
    cubic: float = 0.0

    def value(self, x: Tensor, out: Tensor) -> Tensor:
        """Write f(x) of x (N, f) into out (N, f)."""
        inputs, gates = room_to_widen(x), room(x)
        for rows in slabs(x):
            part = _image(x[rows], inputs)
            gate = self._gate(part, gates[: len(part)])
            _write(gate, part, out[rows])
        return out

    def gradient(self, dy: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Write dy·f'(x) = dy·σ·(1 + x·k'·(1 − σ)) into out (N, f), which may be dy (N, f)."""
        inputs, gates, slopes = room_to_widen(x), room(x), room(x)
        for rows in slabs(x):
            part = _image(x[rows], inputs)
            gate, slope = self._gate(part, gates[: len(part)]), slopes[: len(part)]
            if self.cubic:
                torch.mul(part, part, out=slope).mul_(3 * self.cubic).add_(self.linear).mul_(part)
            else:
                torch.mul(part, self.linear, out=slope)
            slope.addcmul_(slope, gate, value=-1).add_(1).mul_(gate)
            _write(slope, _image(dy[rows], inputs), out[rows])
        return out

    def _gate(self, x: Tensor, out: Tensor) -> Tensor:
        """σ(k(x))."""
        if not self.cubic:
            return torch.mul(x, self.linear, out=out).sigmoid_()
        return torch.mul(x, x, out=out).mul_(self.cubic).add_(self.linear).mul_(x).sigmoid_()


def _image(part: Tensor, scratch: Tensor | None) -> Tensor:
    return part if scratch is None else scratch[: len(part)].copy_(part)


def _write(owned: Tensor, factor: Tensor, out: Tensor) -> None:
    """Owned·factor into out, rounded once; owned is not what it was afterwards."""
    if out.dtype == owned.dtype:
        torch.mul(owned, factor, out=out)
    else:
        out.copy_(owned.mul_(factor))


GELU_TANH = SigmoidGated(2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)
QUICK_GELU = SigmoidGated(1.702)


def _gelu_tanh(x: Tensor, out: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return GELU_TANH.value(x, out)
    result: Tensor = aten.gelu.out(x, approximate="tanh", out=out)
    return result


def _gelu_tanh_gradient(dy: Tensor, x: Tensor, out: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return GELU_TANH.gradient(dy, x, out)
    result: Tensor = aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=out)
    return result


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(
        F.silu,
        lambda x, out: aten.silu.out(x, out=out),
        lambda dy, x, out: aten.silu_backward.grad_input(dy, x, grad_input=out),
    ),
    "gelu": Activation(
        F.gelu,
        lambda x, out: aten.gelu.out(x, out=out),
        lambda dy, x, out: aten.gelu_backward.grad_input(dy, x, grad_input=out),
    ),
    "gelu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh, _gelu_tanh_gradient),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), QUICK_GELU.value, QUICK_GELU.gradient),
    "relu": Activation(
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
