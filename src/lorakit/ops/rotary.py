"""Rotary position embeddings (RoPE): rotate pairs of elements of q and k by angles that grow with the position.

The tables `cos` and `sin` (…, T, rot) come from the model, with any scaling for long contexts. The first rot elements
of a head are rotated, element i with i + rot/2 (Llama, Qwen, Gemma, GPT-NeoX), and the others copied. The backward pass
applies the transposed rotation, from the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ops.kernels import kernels_for


@dataclass(frozen=True)
class Rotary:
    """Rotary tables for one forward pass: cos and sin, (T, rot), (1, T, rot) or (B, T, rot), without gradients."""

    cos: Tensor
    sin: Tensor


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x (B, T, H, D) by token positions; return a new contiguous tensor (B, T, H, D). [docs/math.md (80)]
    Source: Su et al. 2021, arXiv:2104.09864, eq. (34).
    """
    cos, sin = (_with_head_axis(table).to(x.dtype) for table in (rotary.cos, rotary.sin))
    rot = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if _by_kernel(x, cos, sin, False, out):
        return out
    if rot < x.shape[-1]:
        out[..., rot:] = x[..., rot:]
    torch.mul(x[..., :rot], cos, out=out[..., :rot])
    (x1, x2), (s1, s2), (o1, o2) = (t[..., :rot].chunk(2, -1) for t in (x, sin, out))
    o1.addcmul_(x2, s1, value=-1)
    o2.addcmul_(x1, s2)
    return out


def rotate_back_(grad: Tensor, rotary: Rotary) -> Tensor:
    """Replace the gradient (B, T, H, D) of `rotated` with that of its input. [docs/math.md (80)]"""
    cos, sin = (_with_head_axis(table).to(grad.dtype) for table in (rotary.cos, rotary.sin))
    if _by_kernel(grad, cos, sin, True, grad):
        return grad
    (g1, g2), (c1, c2), (s1, s2) = (t[..., : cos.shape[-1]].chunk(2, -1) for t in (grad, cos, sin))
    before = g1.clone()
    g1.mul_(c1).addcmul_(g2, s2)
    g2.mul_(c2).addcmul_(before, s1, value=-1)
    return grad


def _by_kernel(x: Tensor, cos: Tensor, sin: Tensor, back: bool, out: Tensor) -> bool:
    """Write the rotated x (B, T, H, D) to `out` if a compiled kernel supports the call; return whether it does."""
    kernels = kernels_for(x, cos, sin, strided=True)
    if kernels is None or not all(_has_contiguous_heads(t) for t in (x, out)) or len(cos) not in (1, len(x)):
        return False
    kernels.rotate(x, cos, sin, back, out)
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
            raise ValueError(f"rotary table {name} requires a gradient, which is not computed; detach it")
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


def _with_head_axis(table: Tensor) -> Tensor:
    """Reshape a table (T, rot) or (B, T, rot) to (1 or B, T, 1, rot), for use with tensors (B, T, H, D)."""
    return (table if table.dim() == 3 else table.unsqueeze(0)).unsqueeze(2)
