"""Activated LoRA: the adapter acts from its invocation tokens on, and before them the model is the base.

What stands before the invocation has the base's keys and values, so a cache that the base filled can be used again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.factor import Factor
from lorakit.core.kinds import Kind, Slot
from lorakit.core.variants.variant import At, Variant, no_magnitude
from lorakit.errors import MergeError, RouteError


def _output(at: At) -> Tensor:
    """The addition is z from the start of the last invocation on, and zero before it.   [docs/math.md (90)]

    Takes and returns (rows, positions, out).

    Source:
        Greenewald et al. 2025, arXiv:2504.12397, section 3.
    """
    if at.acts is None:
        raise RouteError(
            "An aLoRA adapter is active, and where its invocation tokens stand is not known: the model it was attached "
            "to was not called with input_ids. Pass input_ids, or open lorakit.core.invoked(model, input_ids) around "
            "the call."
        )
    return torch.where(at.acts(at.z), at.z, 0)  # not a product: what is not finite before the start stays out


def _update(kind: Kind, slot: Slot, W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    raise MergeError("aLoRA depends on the position, so it has no place in a weight.")


ALORA = Variant(
    name="alora",
    kinds=("Linear", "Conv1D"),
    mergeable=False,
    has_magnitude=False,
    magnitude=no_magnitude,
    output=_output,
    update=_update,
)
