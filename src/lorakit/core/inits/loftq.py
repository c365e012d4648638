"""LoftQ: the base becomes what a quantized weight can represent, and the adapter starts as the quantization error.

The grids are computed by formula: the normal-float grid of QLoRA, and int8 by row. Rounded weights stay dense, so no
quantization package is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorakit.core.inits.init import Init, InitContext, InitResult, balanced
from lorakit.errors import ConfigError

BLOCK = 64
"""Number of values that share one scale on the normal-float grid."""

OFFSET = 0.9677083
"""The largest quantile of the grid: (1 − 1/32 + 1 − 1/30) / 2, the mean of what 16 and 15 levels would omit."""


def normal_float(device: torch.device | None = None) -> Tensor:
    """Return the 16 levels of nf4: quantiles of a normal distribution, with a zero, in [−1, 1].   [docs/math.md (66)]

    Args:
        device: Device of the result.

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
    """Scale each block of 64 values, in row order, by its largest, and round to the nearest level.

    Args:
        W: (…, n), fp32 or wider.

    Returns:
        Of the shape and dtype of W.
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
    """Scale each row by its largest value, and round to 255 even steps.

    Args:
        W: (…, n), fp32 or wider.

    Returns:
        Of the shape and dtype of W.
    """
    scales = W.abs().amax(-1, keepdim=True)
    return (W * (127 / scales.clamp_min(torch.finfo(W.dtype).tiny))).round() * scales / 127


ROUNDED: Mapping[int, Callable[[Tensor], Tensor]] = {4: on_normal_float, 8: on_int8}
"""Bits -> function that rounds a weight to their grid."""


def _loftq(context: InitContext) -> InitResult:
    """Repeat Q ← q(W − s·B·A), then s·B·A ← the r largest singular directions of W − Q.   [docs/math.md (66)]

    The base becomes Q as a dense weight, which a quantizer with the same grid stores without a further loss.

    Source:
        Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    bits, steps = _settings(context)
    W = context.matrices()
    Q = ROUNDED[bits](W)
    A, B = residual_factors(context, W - Q)
    for _ in range(steps - 1):
        Q = ROUNDED[bits](W - context.scale * (B @ A))
        A, B = residual_factors(context, W - Q)
    return InitResult(*context.in_layout(A, B), W=(Q.mT if context.spec.in_first else Q).reshape(context.read().shape))


def residual_factors(context: InitContext, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (g, r, n) and B (g, out, r) with s·B·A nearest to a quantization error.

    Args:
        context: The site.
        lost: The error, (g, out, n).
    """
    return balanced(context, *torch.linalg.svd(lost, full_matrices=False))


def _settings(context: InitContext) -> tuple[int, int]:
    """Return bits and steps.

    Raises:
        ConfigError: There is no grid for the bits, or no step.
    """
    config = context.config.loftq_config
    given = config if isinstance(config, dict) else vars(config)
    bits, steps = given.get("loftq_bits", 4), given.get("loftq_iter", 1)
    if bits not in ROUNDED:
        raise ConfigError(
            f"loftq_config: loftq_bits is {bits!r}; Only nf4 and int8 quantization is supported: 4 or 8.",
            what=bits,
            field="loftq_config.loftq_bits",
            allowed=("4", "8"),
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError.of("loftq_config.loftq_iter", steps, "a whole number of at least 1")
    return bits, steps


LOFTQ = Init("loftq", _loftq, changes_base=True, is_identity=False, is_exact=False)
