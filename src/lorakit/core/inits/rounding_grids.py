"""Weights rounded to a few bits and back, by formula: the normal-float grid of QLoRA, and int8 by row.

No packed storage is made here, and no package of a quantiser is needed: what comes back is dense, on the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Numbers that share one scale on the normal-float grid."""

OFFSET = 0.9677083
"""The largest quantile of the grid: (1 − 1/32 + 1 − 1/30) / 2, the mean of what 16 and 15 levels would leave out."""


def normal_float(device: torch.device | None = None) -> Tensor:
    """The 16 levels of nf4: quantiles of a normal distribution, with a zero, in [−1, 1].   [docs/math.md (66)]

    Args:
        device: Where they shall live.

    Returns:
        (16,), ascending, fp32.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, eq. (4) and appendix E: 8 levels above zero, 7 below.
    """
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels.max()).to(device, torch.float32)


def on_normal_float(W: Tensor) -> Tensor:
    """Each block of 64 numbers, in the order of rows, scaled by its largest and rounded to the nearest level.

    Args:
        W: (…, n), fp32 or wider.

    Returns:
        Like W.
    """
    flat = W.flatten()
    lack = -len(flat) % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, lack)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = normal_float(W.device).to(W.dtype)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scales.clamp_min(torch.finfo(W.dtype).tiny), between)
    return (levels[nearest] * scales).flatten()[: len(flat)].view_as(W)


def on_int8(W: Tensor) -> Tensor:
    """Each row scaled by its largest number and rounded to 255 even steps.

    Args:
        W: (…, n), fp32 or wider.

    Returns:
        Like W.
    """
    scales = W.abs().amax(-1, keepdim=True)
    return (W * (127 / scales.clamp_min(torch.finfo(W.dtype).tiny))).round() * scales / 127
