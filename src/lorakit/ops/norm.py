"""RMS norm and layer norm with frozen weights: autograd functions, and building blocks for other fused operations.
Saved are the input and one or two statistics per row; a backward pass that needs the output recomputes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.adapted import scratch_like, slabs, upcast_dtype, upcast_scratch
from lorakit.ops.autograd import Context, Replayed, alias, unflat, with_replay, without_autocast
from lorakit.ops.autograd import rows as rows_of
from lorakit.ops.kernels import kernels_for


@dataclass(frozen=True, eq=False)
class Norm:
    """A frozen norm over the last dimension: weight (d,) and, for a layer norm, bias (d,) or None.

    `eps` is added to the mean square ("rms": T5, Llama, Gemma) or to the variance ("layer"), `offset` to the weight: 1
    if the checkpoint stores weight − 1, as Gemma's does. [docs/math.md (76), (77)]

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. (4); Ba, Kiros and Hinton 2016, arXiv:1607.06450, eq. (4).
    """

    kind: Literal["rms", "layer"]
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the normalized x (N, d), and the row statistics (N, 1) that `recompute` and `backward` need."""
        if self.kind == "layer":
            n, mean, rstd = self._layer(x)
            return n, (mean, rstd)
        rstd = x.new_empty(len(x), 1, dtype=upcast_dtype(x.dtype))
        kernels = kernels_for(x, self.weight)
        if kernels is None:
            return self._rms(x, rstd, is_known=False), (rstd,)
        n = torch.empty_like(x)
        kernels.rms_forward(x, self.weight, self.eps, self.offset, n, rstd)
        return n, (rstd,)

    def recompute(self, x: Tensor, stats: Sequence[Tensor]) -> Tensor:
        """Recompute the normalized x (N, d) bit for bit."""
        if self.kind == "layer":
            return self._layer(x)[0]
        kernels = kernels_for(x, self.weight)
        if kernels is None:
            return self._rms(x, stats[0], is_known=True)
        n = torch.empty_like(x)
        kernels.rms_recompute(x, self.weight, self.offset, stats[0], n)
        return n

    def backward(self, dn: Tensor, x: Tensor, stats: Sequence[Tensor], add: Tensor | None = None) -> Tensor:
        """Return the gradient of x (N, d), given that of the normalized x, dn, plus `add` (N, d), as a new tensor."""
        if self.kind == "layer":
            backward = torch.ops.aten.native_layer_norm_backward
            weight = self.weight.to(_dtype_of_parameters(x))
            dx: Tensor = backward(dn.to(x.dtype), x, x.shape[-1:], *stats, weight, None, [True, False, False])[0]
            return dx if add is None else dx.add_(add)
        kernels = kernels_for(x, self.weight, dn, add)
        if kernels is None:
            return self._rms_backward(dn, x, stats[0], add)
        dx = torch.empty_like(x)
        kernels.rms_backward(dn, x, self.weight, self.offset, stats[0], add, dx)
        return dx

    def _layer(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer norm of x (N, d), and the mean (N, 1) and 1/std (N, 1) of each row."""
        dtype = _dtype_of_parameters(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], self.weight.to(dtype), bias, self.eps)
        return n, mean, rstd

    def _gain(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) + self.offset if self.offset else self.weight.to(dtype)

    def _rms(self, x: Tensor, rstd: Tensor, *, is_known: bool) -> Tensor:
        """Return the RMS norm of x (N, d), given 1/RMS of each row (N, 1); unless it is known, write it to `rstd`."""
        n, scratch = torch.empty_like(x), upcast_scratch(x)
        gain = self._gain(rstd.dtype) if self.offset else self.weight
        for rows in slabs(x):
            r, out = rstd[rows], n[rows]
            part = x[rows] if scratch is None else scratch[: len(r)].copy_(x[rows])
            if not is_known:
                torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=r)
                r.square_().div_(x.shape[1]).add_(self.eps).rsqrt_()
            if scratch is None:
                torch.mul(part, r, out=out).mul_(gain)
            elif self.offset:
                out.copy_(part.mul_(r).mul_(gain))
            else:
                out.copy_(part.mul_(r)).mul_(gain)
        return n

    def _rms_backward(self, dn: Tensor, x: Tensor, rstd: Tensor, add: Tensor | None) -> Tensor:
        gain, dx = self._gain(rstd.dtype), torch.empty_like(x)
        inputs, gradients, products = upcast_scratch(x), upcast_scratch(x), scratch_like(x)
        for rows in slabs(x):
            r, part = rstd[rows], x[rows]
            g = dx[rows] if gradients is None else gradients[: len(r)]
            g.copy_(dn[rows]).mul_(gain)
            if inputs is not None:
                part = inputs[: len(r)].copy_(part)
            dot = torch.mul(g, part, out=products[: len(r)]).sum(-1, keepdim=True)
            g.mul_(r).addcmul_(part, dot.mul_(r).mul_(r).mul_(r), value=-1 / x.shape[1])
            if gradients is not None:
                dx[rows].copy_(g)
        return dx if add is None else dx.add_(add)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Apply a frozen norm to x (..., d); the result has the dtype of x."""
    if torch.is_grad_enabled():
        check_frozen_norm(norm)
    if torch.is_grad_enabled() and x.requires_grad:
        n = _Normalize.apply(x, norm)
    else:
        with without_autocast(x):
            n = norm.forward(rows_of(x))[0]
    # reshaped outside the autograd function, because its outputs must not be views if callers modify them in place
    return unflat(n, x)


def norm_recompute(norm: Norm | None, x: Tensor | None, stats: Sequence[Tensor]) -> Tensor:
    """Run `Norm.recompute` on x (N, d), or return x if `norm` is None."""
    assert x is not None  # the forward pass saves x if the backward pass needs the normalized x
    return x if norm is None else norm.recompute(x, stats)


def norm_backward(
    norm: Norm | None, dn: Tensor, x: Tensor | None, stats: Sequence[Tensor], add: Tensor | None
) -> Tensor:
    """Run `Norm.backward` on dn, x and `add`, all (N, d); if `norm` is None, add `add` to dn in place instead."""
    if norm is not None:
        assert x is not None  # with a norm, the forward pass saves x
        return norm.backward(dn, x, stats, add)
    return dn if add is None else dn.add_(add)


def check_frozen_norm(norm: Norm | None) -> None:
    """Check that a norm is frozen, because the fused operations compute no gradients for its parameters.

    Raises:
        ValueError: The weight or bias requires a gradient.
    """
    for name in ("weight", "bias"):
        tensor = None if norm is None else getattr(norm, name)
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"the norm's {name} {tuple(tensor.shape)} requires a gradient, which the fused operations do not "
                "compute; freeze it or call the module directly"
            )


def _dtype_of_parameters(x: Tensor) -> torch.dtype:
    """Return the dtype for weight and bias: fp32 or wider on a CPU, where torch rounds the statistics to it."""
    return upcast_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


def _replay(ctx: Context[Norm], saved: Sequence[Tensor]) -> Replayed:
    x = alias(saved[0])
    return (x, None), (reference.norm(rows_of(x), ctx.state),)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[Norm], x: Tensor, norm: Norm) -> Tensor:
        with without_autocast(x):
            n, stats = norm.forward(rows_of(x))
        ctx.save_for_backward(x, *stats)
        ctx.state = norm
        return n

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[Norm], dn: Tensor) -> tuple[Tensor, None]:
        x, *stats = ctx.saved_tensors
        return ctx.state.backward(rows_of(dn), rows_of(x), stats).view(x.shape), None
