"""EVA: A begins at the strongest directions of what the site receives; ranks go where these explain most."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lorakit.config import EvaConfig
from lorakit.core.inits.init import Init, InitContext, InitResult, zeros
from lorakit.core.kinds import Kind


def sees_inputs(kind: Kind) -> bool:
    """Fit kinds whose modules are called with numbers, not with indices."""
    return kind.acts_on == "input" and kind.drops


def settings_of(blank: InitContext) -> EvaConfig:
    """The settings, PEFT's defaults where there are none."""
    return blank.config.eva_config or EvaConfig()


def _digest(blank: InitContext, collected: Any) -> dict[str, Tensor]:
    """The strongest `rho`·r directions of the inputs, (k, n), with singular values and shares of the variance, (k,)."""
    blank.check_rank(math.prod(blank.A_shape[1:]))
    principal = collected.principal(round(settings_of(blank).rho * blank.r))
    return {"directions": principal.vectors, "values": principal.values, "ratios": principal.ratios}


def _eva(blank: InitContext) -> InitResult:
    """A = the first r principal directions of the inputs, B = 0.   [docs/math.md (64)]

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.2.
    """
    found = blank.found()
    blank.check_rank(len(found["directions"]))
    A = found["directions"][: blank.r]
    if settings_of(blank).whiten:
        A = A / found["values"][: blank.r, None].sqrt()
    return InitResult(A.reshape(blank.A_shape).to(blank.dtype).contiguous(), zeros(blank, blank.B_shape))


EVA = Init(
    name="eva",
    fits=sees_inputs,
    changes_base=False,
    is_identity=True,
    needs="inputs",
    fill=_eva,
    digest=_digest,
)
