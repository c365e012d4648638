"""The int8 form of a frozen weight, W ≈ diag(s)·Q·diag(g): choose its input scales, quantize, dequantize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.choices import KEPT_CHANNELS

LEVELS = 127
"""Largest absolute value of a quantized element; −128 is not used, so that the range is symmetric."""

SMOOTHING = 0.5
"""Default exponent of the activations' maximum in the input scales; 1 moves outliers to the weight entirely."""

SMALLEST = 2.0**-100
"""Rows whose largest absolute value is not above this are quantized to zeros: 127 divided by it must be finite."""


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A frozen weight (out, in), W ≈ diag(s)·Q·diag(g), except for columns that keep their dtype.

    Attributes:
        q: Q, int8 (out, in), contiguous; zero in the columns that are left out.
        scale: s, fp32 (out,).
        gain: g, fp32 (in,), shared by the weights of one input.
        kept: Positions K of the columns that keep their dtype, int64 (k,), ascending, shared likewise.
        columns: W_K (out, k), in the dtype of the original weight.
    """

    q: Tensor
    scale: Tensor
    gain: Tensor
    kept: Tensor
    columns: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the original weight, in which the outputs are."""
        return self.columns.dtype

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the original weight, (out, in)."""
        return self.q.shape

    @property
    def device(self) -> torch.device:
        """Return the device of the tensors."""
        return self.q.device

    @property
    def requires_grad(self) -> bool:
        """Return False: the weight is frozen."""
        return False


def input_scales(
    absmax: Tensor, weights: Sequence[Tensor], kept: int = KEPT_CHANNELS, smoothing: float = SMOOTHING
) -> tuple[Tensor, Tensor]:
    """Return g (in,) and K (k,) for weights (out, in) that share an input.

    g_i = w_i^(1−a) / c_i^a with c_i = `absmax` (in,), the largest |x_i| seen, w_i the largest |W_oi| of all weights,
    and a = `smoothing`, from 0 to 1; 1 if c_i or w_i is 0. With a = 0.5, x·g and W/g have the same largest value in
    each channel, (c_i·w_i)^½. The `kept` channels with the largest are left out.
    """
    seen = absmax.detach().float()
    widest = torch.stack([W.detach().abs().amax(0).float() for W in weights]).amax(0)
    has_values = (seen > 0) & (widest > 0)
    gain = torch.where(has_values, widest ** (1 - smoothing) / seen**smoothing, 1.0)
    left_out = torch.topk(seen * widest, min(kept, len(seen))).indices.sort().values
    return gain, left_out


def quantize_weight(W: Tensor, gain: Tensor, kept: Tensor) -> Int8Weight:
    """Return the int8 form of a weight W (out, in), given g (in,) and K (k,) from `input_scales`."""
    scaled = W.detach().float() / gain
    scaled[:, kept] = 0
    q, scale = quantize_rows(scaled)
    return Int8Weight(q.contiguous(), scale, gain, kept, W.detach()[:, kept].contiguous())


def dequantize(weight: Int8Weight) -> Tensor:
    """Return diag(s)·Q·diag(g) with the columns that kept their dtype, in fp32 (out, in)."""
    W = weight.q.float() * weight.scale[:, None] * weight.gain
    W[:, weight.kept] = weight.columns.float()
    return W


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the rows of x (N, d), fp32, to 255 levels, int8 (N, d), with scales (N,), x ≈ scale·q; 0 for zeros."""
    largest = x.abs().amax(1)
    inverse = torch.full_like(largest, LEVELS) / largest  # a number divided by a tensor would be rounded twice
    inverse = torch.where(largest > SMALLEST, inverse, 0.0)
    return (x * inverse[:, None]).round().to(torch.int8), largest / LEVELS
