"""Inits that look at nothing: Kaiming, Gaussian, and both sides random."""

from __future__ import annotations

from lorakit.core.inits.init import Blank, Filled, Init, normal, uniform, zeros
from lorakit.core.kinds import KINDS

EVERY_KIND = tuple(kind.name for kind in KINDS)


def _kaiming(blank: Blank) -> Filled:
    """One side uniform in ±1/√fan_in (an Embedding's: standard normal), the zero side zero.  [docs/math.md (5), (6)]

    Source: He et al. 2015 with a = √5, as nn.Linear's own start; Hu et al. 2021, section 4.1.
    """
    if blank.kind.zero_side == "A":
        return Filled(zeros(blank, blank.A_shape), normal(blank, blank.B_shape, 1.0))
    return Filled(uniform(blank, blank.A_shape), zeros(blank, blank.B_shape))


def _gaussian(blank: Blank) -> Filled:
    """One side normal with standard deviation 1/r, the zero side zero.  [docs/math.md (5)]."""
    std = 1.0 / blank.r
    if blank.kind.zero_side == "A":
        return Filled(zeros(blank, blank.A_shape), normal(blank, blank.B_shape, std))
    return Filled(normal(blank, blank.A_shape, std), zeros(blank, blank.B_shape))


def _random(blank: Blank) -> Filled:
    """Both sides random, so the adapter acts from the start; for tests and experiments."""
    if blank.kind.zero_side == "A":
        return Filled(normal(blank, blank.A_shape, 1.0), normal(blank, blank.B_shape, 1.0))
    return Filled(uniform(blank, blank.A_shape), uniform(blank, blank.B_shape))


KAIMING = Init(name=True, kinds=EVERY_KIND, changes_base=False, is_identity=True, needs="", fill=_kaiming)
GAUSSIAN = Init(name="gaussian", kinds=EVERY_KIND, changes_base=False, is_identity=True, needs="", fill=_gaussian)
RANDOM = Init(name=False, kinds=EVERY_KIND, changes_base=False, is_identity=False, needs="", fill=_random)
