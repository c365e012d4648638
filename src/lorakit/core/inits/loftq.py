"""LoftQ: the base becomes what few bits can hold, and the adapter begins at what that loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.core.inits.init import MATRICES, Blank, Filled, Init, balanced
from lorakit.core.inits.rounding_grids import on_int8, on_normal_float
from lorakit.errors import ConfigError

ROUNDED: Mapping[int, Callable[[Tensor], Tensor]] = {4: on_normal_float, 8: on_int8}
"""Bits -> the weight on their grid."""


def _loftq(blank: Blank) -> Filled:
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
    return Filled(*blank.laid(A, B), W=(Q.mT if blank.slot.in_first else Q).reshape(blank.read().shape))


def residual_factors(blank: Blank, lost: Tensor) -> tuple[Tensor, Tensor]:
    """A (g, r, n) and B (g, out, r) with s·B·A nearest to what was lost.

    Args:
        blank: The site.
        lost: (g, out, n).
    """
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    return balanced(blank, U[..., : blank.r], S[:, : blank.r], Vh[:, : blank.r])


def _settings(blank: Blank) -> tuple[int, int]:
    """Bits and steps.

    Raises:
        ConfigError: Bits for which there is no grid, or no step.
    """
    given: Any = blank.config.loftq_config or {}
    bits, steps = given.get("loftq_bits", 4), given.get("loftq_iter", 1)
    if bits not in ROUNDED:
        raise ConfigError(f"loftq_config: loftq_bits is {bits!r}; Only nf4 and int8 quantization is supported: 4 or 8.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"loftq_config: loftq_iter is {steps!r}; it must be a whole number of at least 1.")
    return bits, steps


LOFTQ = Init(
    name="loftq",
    kinds=MATRICES,
    changes_base=True,
    is_identity=False,
    needs="",
    fill=_loftq,
    is_exact=False,
)
