"""Activated LoRA: the adapter acts from its invocation tokens on, and before them the model is the base.

What comes before the invocation has the base's keys and values, so a cache that the base filled can be used again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind
from lorakit.core.variants.variant import NO_SETTING, At, Setting, Variant
from lorakit.errors import RouteError


def _setting(config: LoraConfig, path: str) -> Setting | None:
    return NO_SETTING if config.alora_invocation_tokens is not None else None


def _fits(kind: Kind) -> bool:
    return kind.is_dense


def _output(at: At) -> Tensor:
    """The addition is z from the start of the last invocation on, and zero before it.   [docs/math.md (90)]

    Takes and returns (rows, positions, out).

    Source:
        Greenewald et al. 2025, arXiv:2504.12397, section 3.
    """
    if at.mask is None:
        raise RouteError(
            "An aLoRA adapter is active, and where its invocation tokens stand is not known: the model it was attached "
            "to was not called with input_ids. Pass input_ids, or open lorakit.core.invoked(model, input_ids) around "
            "the call."
        )
    return torch.where(at.mask(at.z), at.z, 0)  # not a product: what is not finite before the start stays out


ALORA = Variant(
    name="alora",
    title="aLoRA",
    field="alora_invocation_tokens",
    setting=_setting,
    fits=_fits,
    output=_output,
    update=None,
    unmergeable_reason="what it adds depends on where a token stands",
    must_agree="act after different invocation tokens",
)
