"""Normalisation of rows with frozen weights: RMS norm and layer norm, as halves for other operations and by themselves.

Nothing is saved but the input and one or two numbers a row; what a norm gave is made again where a backward wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakit.ops.adapted import as_written, room, room_to_widen, slabs, unflat, wide
from lorakit.ops.adapted import rows as rows_of
from lorakit.ops.kernels.choosing import kernels_for


@dataclass(frozen=True, eq=False)
class Norm:
    """A frozen normalisation of the last dimension.

    Attributes:
        kind: "rms" (T5, Llama, Gemma) or "layer".
        weight: (d,), or None for ones.
        bias: (d,) of a layer norm, or None.
        eps: Added to the mean square, or to the variance.
        offset: Added to the weight: 1 where the checkpoint stores it from zero (Gemma).
    """

    kind: Literal["rms", "layer"]
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The normalised x (N, d) and the numbers of each row, (N, 1) each, that the other methods take."""
        if self.kind == "layer":
            n, mean, rstd = layer_forward(x, self.weight, self.bias, self.eps)
            return n, (mean, rstd)
        n, rstd = rms_forward(x, self.weight, self.eps, self.offset)
        return n, (rstd,)

    def again(self, x: Tensor, stats: Sequence[Tensor]) -> Tensor:
        """The normalised x (N, d) once more, to the bit."""
        if self.kind == "layer":
            return layer_forward(x, self.weight, self.bias, self.eps)[0]
        return rms_again(x, stats[0], self.weight, self.offset)

    def backward(self, dn: Tensor, x: Tensor, stats: Sequence[Tensor], add: Tensor | None = None) -> Tensor:
        """The gradient for x (N, d) from that for the normalised x (N, d), plus `add` (N, d); a new tensor."""
        if self.kind == "layer":
            dx = layer_backward(dn, x, stats[0], stats[1], self.weight)
            return dx if add is None else dx.add_(add)
        return rms_backward(dn, x, stats[0], self.weight, self.offset, add)


def reference(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x (..., d) in plain PyTorch, rounded where transformers rounds."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    n = x.to(wide(x.dtype))
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + norm.eps)
    if norm.offset:
        return (n if norm.weight is None else n * (norm.offset + norm.weight.to(n.dtype))).to(x.dtype)
    return n.to(x.dtype) if norm.weight is None else n.to(x.dtype) * norm.weight.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm of x (..., d) with a frozen weight (d,), [docs/math.md (76)]; saves x and a number a row.

    Raises:
        ValueError: The weight asks for a gradient.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. (4).
    """
    return normalised(x, Norm("rms", weight, None, eps, offset))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of x (..., d) with frozen weight and bias (d,), [docs/math.md (77)]; saves x and two numbers a row.

    Raises:
        ValueError: The weight or the bias asks for a gradient.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, eq. (4).
    """
    return normalised(x, Norm("layer", weight, bias, eps))


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x (..., d), in its dtype.

    Raises:
        ValueError: Weight or bias of the norm ask for a gradient.
    """
    if torch.is_grad_enabled():
        refuse_trained_norm(norm)
    if torch.is_grad_enabled() and x.requires_grad:
        n = _Normalised.apply(x, norm)
    else:
        with as_written(x):
            n = norm.forward(rows_of(x))[0]
    return unflat(n, x)  # here: an output that is a view could not be changed in place


def back_through(
    norm: Norm | None, dn: Tensor, x: Tensor | None, stats: Sequence[Tensor], add: Tensor | None
) -> Tensor:
    """`Norm.backward` of dn, x and add (N, d); where there is no norm, dn plus add, in the place of dn."""
    if norm is not None:
        assert x is not None  # a forward keeps it where a norm has to be gone back through
        return norm.backward(dn, x, stats, add)
    return dn if add is None else dn.add_(add)


def refuse_trained_norm(norm: Norm | None) -> None:
    """Refuse a norm that is trained: the fused operations make no gradient for it.

    Raises:
        ValueError: Weight or bias ask for a gradient.
    """
    for name in ("weight", "bias"):
        tensor = None if norm is None else getattr(norm, name)
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"the {name} {tuple(tensor.shape)} of a norm asks for a gradient, and the fused operations make none "
                "for it; freeze it, or run the module itself"
            )


# ---- halves: rows in, rows out, no autograd


def rms_forward(x: Tensor, w: Tensor | None, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """RMS norm of x (N, d) and 1/rms of its rows (N, 1), in fp32 or wider, by [docs/math.md (76)]."""
    rstd = x.new_empty(len(x), 1, dtype=wide(x.dtype))
    kernels = kernels_for(x, w)
    if kernels is None:
        return _rms(x, rstd, w, offset, eps), rstd
    n = torch.empty_like(x)
    kernels.rms_forward(x, w, eps, offset, n, rstd)
    return n, rstd


def rms_again(x: Tensor, rstd: Tensor, w: Tensor | None, offset: float = 0.0) -> Tensor:
    """What `rms_forward` gave of x (N, d), from the rstd (N, 1) that it gave."""
    kernels = kernels_for(x, w)
    if kernels is None:
        return _rms(x, rstd, w, offset, None)
    n = torch.empty_like(x)
    kernels.rms_again(x, w, offset, rstd, n)
    return n


def rms_backward(
    dn: Tensor, x: Tensor, rstd: Tensor, w: Tensor | None, offset: float = 0.0, add: Tensor | None = None
) -> Tensor:
    """The gradient for x (N, d) from that for its norm (N, d), plus `add` (N, d); a new tensor.

    rstd (N, 1) is what the forward gave, w (d,) the weight.
    """
    kernels, dx = kernels_for(x, w, dn, add), torch.empty_like(x)
    if kernels is not None:
        kernels.rms_backward(dn, x, w, offset, rstd, add, dx)
        return dx
    _rms_backward(dn, x, rstd, _gain(w, offset, rstd.dtype), dx)
    return dx if add is None else dx.add_(add)


def layer_forward(x: Tensor, w: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of x (N, d), and mean and 1/deviation of its rows, (N, 1) each, by [docs/math.md (77)]."""
    bias = None if bias is None else bias.to(_dtype_of_parameters(x))
    n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], _weight(w, x), bias, eps)
    return n, mean, rstd


def layer_backward(dn: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor | None) -> Tensor:
    """The gradient for x (N, d) from that for its norm (N, d), mean and rstd (N, 1) and the weight (d,)."""
    backward = torch.ops.aten.native_layer_norm_backward
    dx: Tensor = backward(dn.to(x.dtype), x, x.shape[-1:], mean, rstd, _weight(w, x), None, [True, False, False])[0]
    return dx


def _rms(x: Tensor, rstd: Tensor, w: Tensor | None, offset: float, eps: float | None) -> Tensor:
    """RMS norm with the given rstd, which is filled first where there is an eps."""
    n, scratch = torch.empty_like(x), room_to_widen(x)
    gain = _gain(w, offset, rstd.dtype) if offset else w
    for rows in slabs(x):
        r, out = rstd[rows], n[rows]
        part = x[rows] if scratch is None else scratch[: len(r)].copy_(x[rows])
        if eps is not None:
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=r)
            r.square_().div_(x.shape[1]).add_(eps).rsqrt_()
        if scratch is None:
            torch.mul(part, r, out=out)
        elif offset and gain is not None:
            out.copy_(part.mul_(r).mul_(gain))
            continue
        else:
            out.copy_(part.mul_(r))
        if gain is not None:
            out.mul_(gain)
    return n


def _rms_backward(dn: Tensor, x: Tensor, rstd: Tensor, gain: Tensor | None, dx: Tensor) -> None:
    inputs, gradients, products = room_to_widen(x), room_to_widen(x), room(x)
    for rows in slabs(x):
        r, part = rstd[rows], x[rows]
        g = dx[rows] if gradients is None else gradients[: len(r)]
        if gain is None:
            g.copy_(dn[rows])
        else:
            g.copy_(dn[rows]).mul_(gain)
        if inputs is not None:
            part = inputs[: len(r)].copy_(part)
        dot = torch.mul(g, part, out=products[: len(r)]).sum(-1, keepdim=True)
        g.mul_(r).addcmul_(part, dot.mul_(r).mul_(r).mul_(r), value=-1 / x.shape[1])
        if gradients is not None:
            dx[rows].copy_(g)


def _gain(w: Tensor | None, offset: float, dtype: torch.dtype) -> Tensor | None:
    return None if w is None else w.to(dtype) + offset if offset else w.to(dtype)


def _weight(w: Tensor | None, x: Tensor) -> Tensor:
    dtype = _dtype_of_parameters(x)
    return x.new_ones(x.shape[-1], dtype=dtype) if w is None else w.to(dtype)


def _dtype_of_parameters(x: Tensor) -> torch.dtype:
    """On a CPU, weights in bf16 would have torch round mean and deviation to bf16 too; fp32 images of them do not."""
    return wide(x.dtype) if x.device.type == "cpu" else x.dtype


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        with as_written(x):
            n, stats = norm.forward(rows_of(x))
        ctx.save_for_backward(x, *stats)
        ctx.norm = norm
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor, None]:
        x, *stats = ctx.saved_tensors
        return ctx.norm.backward(rows_of(dn), rows_of(x), stats).view(x.shape), None
