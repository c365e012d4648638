"""LoftQ: the base is rounded to a quantization grid, and the adapter starts as an approximation of the rounding error.

The grids are QLoRA's NF4 grid, and int8 with one scale per row. Rounded weights stay dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorakit.core.inits.init import Init, InitContext, InitResult, balanced
from lorakit.errors import ConfigError

BLOCK = 64
"""Number of values that share one scale on the NF4 grid."""

OFFSET = 0.9677083
"""The largest quantile of the grid: the mean of 1 − 1/32 and 1 − 1/30, the outermost quantiles for 16 and 15 levels."""


def normal_float(device: torch.device | None = None) -> Tensor:
    """Return the 16 NF4 levels (16,): ascending normal quantiles scaled to [−1, 1], including 0.   [docs/math.md (66)]

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, eq. (4) and appendix E: 8 levels above zero, 7 below.
    """
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels.max()).to(device, torch.float32)


def on_normal_float(W: Tensor) -> Tensor:
    """Round W (…, n) to the NF4 grid; each 64 values, in row-major order, are scaled by their largest magnitude."""
    flat = W.flatten()
    lack = -len(flat) % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, lack)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = normal_float(W.device).to(W.dtype)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scales.clamp_min(torch.finfo(W.dtype).tiny), between)
    return (levels[nearest] * scales).flatten()[: len(flat)].view_as(W)


def on_int8(W: Tensor) -> Tensor:
    """Round W (…, n) to int8; each row is scaled by its largest magnitude and rounded to 255 evenly spaced levels."""
    scales = W.abs().amax(-1, keepdim=True)
    return (W * (127 / scales.clamp_min(torch.finfo(W.dtype).tiny))).round() * scales / 127


ROUNDED: Mapping[int, Callable[[Tensor], Tensor]] = {4: on_normal_float, 8: on_int8}
"""Dict from numbers of bits to functions that round a weight to the grid with that many bits."""


def _loftq(context: InitContext) -> InitResult:
    """Repeat Q ← q(W − s·B·A), then s·B·A ← the best rank-r approximation of W − Q.   [docs/math.md (66)]

    The base becomes Q, stored as a dense weight; a quantizer with the same grid can store Q without further loss.

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
    """Return A (g, r, n) and B (g, out, r) such that s·B·A best approximates a quantization error (g, out, n)."""
    return balanced(context, *torch.linalg.svd(lost, full_matrices=False))


def _settings(context: InitContext) -> tuple[int, int]:
    """Return the number of bits and the number of iterations from `loftq_config`."""
    config = context.config.loftq_config
    given = config if isinstance(config, dict) else vars(config)
    bits, steps = given.get("loftq_bits", 4), given.get("loftq_iter", 1)
    if bits not in ROUNDED:
        raise ConfigError(
            f"loftq_config: loftq_bits is {bits!r}. Only nf4 and int8 quantization is supported: use 4 or 8.",
            what=bits,
            field="loftq_config.loftq_bits",
            allowed=("4", "8"),
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError.of("loftq_config.loftq_iter", steps, "an integer >= 1")
    return bits, steps


LOFTQ = Init("loftq", _loftq, changes_base=True, is_identity=False, is_exact=False)
