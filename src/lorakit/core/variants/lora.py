"""LoRA as it was published, and rsLoRA, which differs in the scale alone."""

from __future__ import annotations

from torch import Tensor

from lorakit.core.factor import Factor
from lorakit.core.kinds import KINDS, Kind, Slot
from lorakit.core.variants.variant import At, Variant, no_magnitude


def _output(at: At) -> Tensor:
    """H = W x + s·B(A x): the addition is z.   [docs/math.md (2)]

    Takes and returns (…, out). Source: Hu et al. 2021, arXiv:2106.09685, eq. (3).
    """
    return at.z


def _update(kind: Kind, slot: Slot, W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    return delta


PLAIN = Variant(
    name="plain",
    kinds=tuple(kind.name for kind in KINDS),
    mergeable=True,
    has_magnitude=False,
    magnitude=no_magnitude,
    output=_output,
    update=_update,
)
