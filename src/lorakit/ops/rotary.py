"""Rotary position embeddings (RoPE): rotate pairs of elements of q and k by angles that grow with the position.

The tables `cos` and `sin` (…, T, rot) come from the model, with any scaling for long contexts. The first rot elements
of a head are rotated, the others copied. `half` pairs element i with i + rot/2 (Llama, Qwen, Gemma, GPT-NeoX), and
`interleaved` 2i with 2i + 1 (GPT-J, Cohere, GLM). The backward pass applies the transposed rotation, from the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.autograd import Context, Replayed, with_replay
from lorakit.ops.kernels import kernels_for

Pairs = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotary:
    """Rotary tables for one forward pass: cos and sin, (T, rot), (1, T, rot) or (B, T, rot), without gradients."""

    cos: Tensor
    sin: Tensor
    pairs: Pairs = "half"


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x (B, H, T, D) by token positions; the result is stored as (B, T, H, D). [docs/math.md (80)]
    Source: Su et al. 2021, arXiv:2104.09864, eq. (34).
    """
    check(x, rotary)
    return _Rotate.apply(x, rotary)


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Run `rotate` on x (B, T, H, D) without autograd or checks; return a new contiguous tensor (B, T, H, D)."""
    cos, sin = (_with_head_axis(table).to(x.dtype) for table in (rotary.cos, rotary.sin))
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


def rotate_back_(grad: Tensor, rotary: Rotary) -> Tensor:
    """Replace the gradient (B, T, H, D) of `rotated` with that of its input. [docs/math.md (80)]"""
    cos, sin = (_with_head_axis(table).to(grad.dtype) for table in (rotary.cos, rotary.sin))
    if _by_kernel(grad, cos, sin, rotary.pairs, True, grad):
        return grad
    (g1, g2), (c1, c2), (s1, s2) = (_halves(t[..., : cos.shape[-1]], rotary.pairs) for t in (grad, cos, sin))
    before = g1.clone()
    g1.mul_(c1).addcmul_(g2, s2)
    g2.mul_(c2).addcmul_(before, s1, value=-1)
    return grad


def _by_kernel(x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs, back: bool, out: Tensor) -> bool:
    """Write the rotated x (B, T, H, D) to `out` if a compiled kernel supports the call; return whether it does."""
    kernels = kernels_for(x, cos, sin, strided=True)
    if kernels is None or not all(_has_contiguous_heads(t) for t in (x, out)) or len(cos) not in (1, len(x)):
        return False
    kernels.rotate(x, cos, sin, pairs == "interleaved", back, out)
    return True


def _has_contiguous_heads(x: Tensor) -> bool:
    """Return whether the heads of each token of x (B, T, H, D) are contiguous and tokens are evenly spaced."""
    batch, tokens, heads, width = x.shape
    apart = x.stride(1)
    if x.stride()[2:] != (width, 1) or (batch > 1 and x.stride(0) != tokens * apart):
        return False
    return apart >= heads * width or batch * tokens == 1  # false if x is an expanded view whose tokens share memory


def check(x: Tensor, rotary: Rotary) -> None:
    """Check that the tables match x (B, H, T, D).

    Raises:
        ValueError: A table does not match x or requires a gradient, or rot is odd or larger than D.
    """
    batch, _, length, width = x.shape
    for name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
        if table.requires_grad:
            raise ValueError(f"rotary table {name} requires a gradient, which rotate() does not compute; detach it")
        rows = table.shape[0] if table.dim() == 3 else 1
        if table.dim() not in (2, 3) or table.shape[-2] != length or rows not in (1, batch):
            wanted = f"({length}, rot) or ({batch}, {length}, rot)"
            raise ValueError(f"rotary table {name} must have shape {wanted}; got {tuple(table.shape)}")
        if table.shape[-1] % 2 or table.shape[-1] > width:
            raise ValueError(
                f"rotary table {name}: rot must be even and at most the head width {width}; got {table.shape[-1]}"
            )
    if rotary.cos.shape != rotary.sin.shape:
        raise ValueError(
            f"rotary tables must have equal shapes; got cos {tuple(rotary.cos.shape)} and sin {tuple(rotary.sin.shape)}"
        )


_State = tuple[Rotary, torch.Size, torch.dtype]
"""The tables, and the shape and dtype of x."""


def _replay(ctx: Context[_State], saved: Sequence[Tensor]) -> Replayed:
    rotary, shape, dtype = ctx.state
    x = torch.zeros(shape, dtype=dtype, device=rotary.cos.device, requires_grad=True)
    return (x, None), (reference.rotary(x, rotary),)


class _Rotate(torch.autograd.Function):
    """`rotated` and `rotate_back_` as an autograd function, which saves only the tables."""

    @staticmethod
    def forward(ctx: Context[_State], x: Tensor, rotary: Rotary) -> Tensor:
        ctx.state = rotary, x.shape, x.dtype
        return rotated(x.transpose(1, 2), rotary).transpose(1, 2)

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[_State], grad: Tensor) -> tuple[Tensor, None]:
        # copied, because autograd may also pass grad to other functions
        owned = grad.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return rotate_back_(owned, ctx.state[0]).transpose(1, 2), None


def _with_head_axis(table: Tensor) -> Tensor:
    """Reshape a table (T, rot) or (B, T, rot) to (1 or B, T, 1, rot), for use with tensors (B, T, H, D)."""
    return (table if table.dim() == 3 else table.unsqueeze(0)).unsqueeze(2)


def _halves(x: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return two views (…, rot/2): the first elements of all pairs, and the second elements of all pairs."""
    if pairs == "half":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]
