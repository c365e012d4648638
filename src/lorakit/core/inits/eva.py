"""EVA: initialize A with principal directions of the inputs, and move ranks to sites where they explain the most."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from lorakit.config import EvaConfig
from lorakit.core.inits.init import Init, InitContext, InitResult, zeros
from lorakit.core.kinds import Kind
from lorakit.core.linalg import Principal


class InputMoments(Protocol):
    """Moments of a site's inputs, collected by `lorakit.core.statistics`: `rows` inputs of `calls` calls."""

    rows: int
    calls: int

    def second_moment(self) -> Tensor:
        """Return Σ x·xᵀ / rows, (in, in)."""

    def principal(self, k: int) -> Principal:
        """Return the first k principal directions, (k, in)."""


def sees_inputs(kind: Kind) -> bool:
    """Return whether modules of the given kind take values, not indices, as input."""
    return kind.acts_on == "input" and kind.drops


def _settings(context: InitContext) -> EvaConfig:
    return context.config.eva_config or EvaConfig()


def _digest(context: InitContext, statistics: InputMoments) -> dict[str, Tensor]:
    """Return the first `rho`·r principal directions (k, in), and their singular values and variance ratios, (k,)."""
    context.check_rank(math.prod(context.A_shape[1:]))
    principal = statistics.principal(round(_settings(context).rho * context.r))
    return {"directions": principal.vectors, "values": principal.values, "ratios": principal.ratios}


def _eva(context: InitContext) -> InitResult:
    """Set A to the first r principal directions of the inputs and B to zero.   [docs/math.md (64)]

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.2.
    """
    found = context.collected()
    context.check_rank(len(found["directions"]))
    A = found["directions"][: context.r]
    if _settings(context).whiten:
        A = A / found["values"][: context.r, None].sqrt()
    return InitResult(A.reshape(context.A_shape).to(context.dtype).contiguous(), zeros(context, context.B_shape))


EVA = Init("eva", _eva, fits=sees_inputs, needs="inputs", digest=_digest)
