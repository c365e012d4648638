"""What one adapter holds at one site: the modules that carry A, B and a magnitude, and the view that arithmetic reads.

A and B lie in nn.Linear orientation, A (r, in) and B (out, r), whatever the base's own weight looks like. The
modules only carry parameters under the field's names; their `forward` is not used here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Factor:
    """One adapter at one site, as arithmetic sees it.

    Attributes:
        A: Down projection, (r, in).
        B: Up projection, (out, r).
        scale: alpha / r, or alpha / √r for rsLoRA.
        dropout: What the input passes before A.
        variant: Name of the row of VARIANTS.
        magnitude: Norm per output that DoRA learns, (out,), or None.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: nn.Module
    variant: str
    magnitude: Tensor | None = None


class FactorWeight(nn.Linear):
    """Carries A or B as `.weight`; an nn.Linear for programs that look for one, without its random start."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)


class Magnitude(nn.Module):
    """Carries DoRA's magnitude as `.weight`, (out,)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
