"""Weights rounded to a few bits and back, by formula: the normal-float grid of QLoRA, and int8 by row.

No packed storage is made here, and no package of a quantiser is needed: what comes back is dense, on the grid.

LoftQ: the base becomes what few bits can hold, and the adapter begins at what that loses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.core.inits.init import Init, InitContext, InitResult, balanced
from lorakit.core.kinds import every_kind_of_the_table
from lorakit.errors import ConfigError

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


ROUNDED: Mapping[int, Callable[[Tensor], Tensor]] = {4: on_normal_float, 8: on_int8}
"""Bits -> the weight on their grid."""


def _loftq(blank: InitContext) -> InitResult:
    """Q ← q(W − s·B·A), then s·B·A ← the r strongest directions of W − Q, so many times.   [docs/math.md (66)]

    The base becomes Q as a dense weight, which a quantiser of the same grid stores without a further loss.

    Source:
        Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    bits, steps = _settings(blank)
    W = blank.matrices()
    blank.check_rank(min(W.shape[1:]))
    Q = ROUNDED[bits](W)
    A, B = residual_factors(blank, W - Q)
    for _ in range(steps - 1):
        Q = ROUNDED[bits](W - blank.scale * (B @ A))
        A, B = residual_factors(blank, W - Q)
    return InitResult(*blank.laid(A, B), W=(Q.mT if blank.slot.in_first else Q).reshape(blank.read().shape))


def residual_factors(blank: InitContext, lost: Tensor) -> tuple[Tensor, Tensor]:
    """A (g, r, n) and B (g, out, r) with s·B·A nearest to what was lost.

    Args:
        blank: The site.
        lost: (g, out, n).
    """
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    return balanced(blank, U[..., : blank.r], S[:, : blank.r], Vh[:, : blank.r])


def _settings(blank: InitContext) -> tuple[int, int]:
    """Bits and steps.

    Raises:
        ConfigError: Bits for which there is no grid, or no step.
    """
    given: Any = blank.config.loftq_config or {}
    bits, steps = given.get("loftq_bits", 4), given.get("loftq_iter", 1)
    if bits not in ROUNDED:
        raise ConfigError(
            f"loftq_config: loftq_bits is {bits!r}; Only nf4 and int8 quantization is supported: 4 or 8.",
            what=bits,
            field="loftq_config.loftq_bits",
            allowed=("4", "8"),
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(
            f"loftq_config: loftq_iter is {steps!r}; it must be a whole number of at least 1.",
            what=steps,
            field="loftq_config.loftq_iter",
        )
    return bits, steps


LOFTQ = Init(
    name="loftq",
    fits=every_kind_of_the_table,
    changes_base=True,
    is_identity=False,
    needs="",
    fill=_loftq,
    is_exact=False,
)
