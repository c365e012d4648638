"""The operands of linear modules as they act in one call: plain ones, adapted by lorakit, or adapted by `peft`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.core.layering.operands import operand
from lorakit.core.routes.routing import Route
from lorakit.ops.adapted import Adapted, factors
from lorakit.speed.peft_layers import is_peft_linear, peft_operand


def operands_of(modules: Sequence[nn.Module], route: Route | None, x: Tensor) -> list[Adapted] | None:
    """The operands of modules that one call runs through, or None where one of them has none that can be used.

    Args:
        modules: Linear modules, with adapters or without.
        route: The route of this forward, or None where the model has no adapters of ours.
        x: What the call got, (…, in).
    """
    found = []
    for module in modules:
        one = peft_operand(module) if is_peft_linear(module) else operand(module, route)
        if one is None or not _is_here(one, x):
            return None
        found.append(one)
    return found


def _is_here(one: Adapted, x: Tensor) -> bool:
    """Whether all tensors are whole, on the device of x (…, in), and in a dtype with which the module would run."""
    cast = torch.is_autocast_enabled(x.device.type)
    for base in (one.W, one.bias):
        if base is not None and not (cast or base.dtype == x.dtype):
            return False
    tensors = (one.W, one.bias, *factors([one]))
    # a shard of a tensor (DTensor) is of another type
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and t.device == x.device) for t in tensors)
