"""Rotary positions: pairs of numbers of q and k turned by an angle that grows with the token's place.

The tables `cos` and `sin` come from the model (`transformers` makes them once per forward, with its scaling for long
contexts in them), so nothing here knows a base or a frequency. They are (…, T, rot), rot ≤ D even: the first rot
numbers of a head are turned, the others pass. Two ways to choose the pairs are in use: `half` pairs i with i + rot/2
(Llama, Qwen, Gemma, GPT-NeoX), `interleaved` pairs 2i with 2i + 1 (GPT-J, Cohere, GLM). Both are linear, so the
backward is the transposed turn and needs the tables alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops.kernels.choosing import kernels_for

Pairs = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotary:
    """Tables of one forward, shared by all its layers.

    cos, sin: (T, rot) or (B, T, rot), or with 1 for B; no gradient goes to them.
    pairs: which two numbers turn together.
    """

    cos: Tensor
    sin: Tensor
    pairs: Pairs = "half"


def reference(x: Tensor, rotary: Rotary) -> Tensor:
    """Sum of x∘cos and turned(x)∘sin on the first rot numbers of a head. x (B, H, T, D) -> (B, H, T, D)."""
    cos, sin = (_beside(table, 1).to(x.dtype) for table in (rotary.cos, rotary.sin))
    turning, passing = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = _halves(turning, rotary.pairs)
    if rotary.pairs == "half":
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return torch.cat((turning * cos + turned * sin, passing), dim=-1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs of x, formula [docs/math.md (80)], differentiable in x.

    x (B, H, T, D) in any strides -> (B, H, T, D), stored as (B, T, H, D).

    Source: Su et al. 2021, arXiv:2104.09864, eq. (34).

    Raises:
        ValueError: rot is odd or larger than D, T or B of the tables does not fit, or a table requires a gradient.
    """
    check(x, rotary)
    return _Rotate.apply(x, rotary)


def turned(x: Tensor, rotary: Rotary) -> Tensor:
    """`rotate` without autograd and without checks. x (B, T, H, D) -> a new (B, T, H, D), contiguous."""
    cos, sin = (_beside(table, 2).to(x.dtype) for table in (rotary.cos, rotary.sin))
    rot = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if _by_kernel(x, cos, sin, rotary.pairs, False, out):
        return out
    if rot < x.shape[-1]:
        out[..., rot:] = x[..., rot:]
    torch.mul(x[..., :rot], cos, out=out[..., :rot])
    (x1, x2), (s1, s2), (o1, o2) = (_halves(t[..., :rot], rotary.pairs) for t in (x, sin, out))
    o1.addcmul_(x2, s1, value=-1)
    o2.addcmul_(x1, s2)
    return out


def turn_back_(grad: Tensor, rotary: Rotary) -> Tensor:
    """The transposed turn, in place: the gradient of `turned`'s input from that of its output, [docs/math.md (80)].

    grad (B, T, H, D), owned by the caller, in any strides -> itself.
    """
    cos, sin = (_beside(table, 2).to(grad.dtype) for table in (rotary.cos, rotary.sin))
    if _by_kernel(grad, cos, sin, rotary.pairs, True, grad):
        return grad
    (g1, g2), (c1, c2), (s1, s2) = (_halves(t[..., : cos.shape[-1]], rotary.pairs) for t in (grad, cos, sin))
    before = g1.clone()
    g1.mul_(c1).addcmul_(g2, s2)
    g2.mul_(c2).addcmul_(before, s1, value=-1)
    return grad


def _by_kernel(x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, back: bool, out: Tensor) -> bool:
    """Whether a compiled kernel has turned x (B, T, H, D) into out: not where heads are not side by side."""
    kernels = kernels_for(x, cos, sin, strided=True)
    if kernels is None or not all(_beside_each_other(t) for t in (x, out)) or len(cos) not in (1, len(x)):
        return False
    kernels.turn(x, cos, sin, pairs == "interleaved", back, out)
    return True


def _beside_each_other(x: Tensor) -> bool:
    """Whether the heads of a token of x (B, T, H, D) lie side by side, and tokens at one distance."""
    batch, tokens, heads, width = x.shape
    apart = x.stride(1)
    if x.stride()[2:] != (width, 1) or (batch > 1 and x.stride(0) != tokens * apart):
        return False
    return apart >= heads * width or batch * tokens == 1  # else tokens share memory: an expanded x


def check(x: Tensor, rotary: Rotary) -> None:
    """That the tables fit x (B, H, T, D).

    Raises:
        ValueError: They do not, or one of them requires a gradient.
    """
    batch, _, length, width = x.shape
    for name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
        if table.requires_grad:
            raise ValueError(f"the rotary table {name} requires a gradient; rotate() gives none to it: detach it")
        rows = table.shape[0] if table.dim() == 3 else 1
        if table.dim() not in (2, 3) or table.shape[-2] != length or rows not in (1, batch):
            wanted = f"({length}, rot) or ({batch}, {length}, rot)"
            raise ValueError(f"the rotary table {name} has shape {tuple(table.shape)}, not {wanted}")
        if table.shape[-1] % 2 or table.shape[-1] > width:
            raise ValueError(f"{name} turns {table.shape[-1]} of {width} numbers a head: not even, or too many")
    if rotary.cos.shape != rotary.sin.shape:
        raise ValueError(f"cos {tuple(rotary.cos.shape)} and sin {tuple(rotary.sin.shape)} differ in shape")


class _Rotate(torch.autograd.Function):
    """`turned` and `turn_back_` as one function of autograd; it keeps the tables and nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotary: Rotary) -> Tensor:
        ctx.rotary = rotary
        return turned(x.transpose(1, 2), rotary).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        owned = grad.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # autograd may hand it to others too
        return turn_back_(owned, ctx.rotary).transpose(1, 2), None


def _beside(table: Tensor, axis: int) -> Tensor:
    """A table (T, rot) or (B, T, rot) with an axis of 1 where the heads are: 1 in (B, H, T, D), 2 in (B, T, H, D)."""
    return (table if table.dim() == 3 else table.unsqueeze(0)).unsqueeze(axis)


def _halves(x: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second numbers of all pairs, each (…, rot/2)."""
    if pairs == "half":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]
