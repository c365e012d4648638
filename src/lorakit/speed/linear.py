"""The recipe of single adapted linear modules, ours and peft's: base and adapter as one function, x kept once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.operands import frozen_linear
from lorakit.core.routes.forwards import Forwards
from lorakit.ops.linear import linears
from lorakit.speed.operands import acting_in
from lorakit.speed.parts import is_usual
from lorakit.speed.peft_layers import is_peft_linear


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters around a base."""
    return isinstance(module, LoraLayer) or is_peft_linear(module)


def fits(module: nn.Module) -> str | None:
    """Why a module is no adapted linear one that is known, or None where it is one."""
    if not is_adapted(module):
        return "it has no adapter"
    base: Any = module.owner if isinstance(module, LoraLayer) else module.base_layer
    return None if frozen_linear(base) is not None else "its base is no plain, frozen linear module"


def run(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """The layer's output (…, out) for x (…, in), or None where its own forward has to run."""
    if args or kwargs or not isinstance(x, Tensor) or not is_usual(x):
        return None
    forwards = module.forwards if isinstance(module, LoraLayer) else Forwards()
    acting = acting_in([module], forwards, x)
    if acting is None or acting.operands[0].low is None:  # without an adapter there is nothing to gain
        return None
    (y,) = linears(x, acting.operands)
    acting.note(y)
    return y
