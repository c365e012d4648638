"""Condition numbers of a base's weights: how far apart the largest and the smallest singular value lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.core.bases import base_of

EXPERT_WEIGHTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""How the names of fused experts' weights end."""

SMALLEST = 1e-8
"""Added to the smallest singular value, so that a singular weight has a number."""


def of_linear_weights(model: nn.Module, largest: int) -> dict[str, float]:
    """Path -> condition number of every dense layer.

    Args:
        model: The model, only read.
        largest: Leave out weights with a larger side.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and max(module.out_features, module.in_features) <= largest:
            base = base_of(module)
            found[path] = condition_number(base.read(module, base.stored(module, "weight")))
    return found


def of_expert_weights(model: nn.Module, endings: Sequence[str], largest: int) -> dict[str, float]:
    """Name -> mean condition number over the experts of every fused weight.

    Args:
        model: The model, only read.
        endings: How the names of fused weights end.
        largest: Leave out weights with a larger side.
    """
    return {
        name: sum(condition_number(expert) for expert in parameter) / len(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.endswith(tuple(endings)) and max(parameter.shape[1:]) <= largest
    }


def condition_number(weight: Tensor) -> float:
    """Largest over smallest singular value of a weight, (out, in)."""
    values = torch.linalg.svdvals(weight.detach().float())
    return float(values[0] / (values[-1] + SMALLEST))
