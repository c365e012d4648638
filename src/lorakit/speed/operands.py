"""The operands of linear modules as they act in one call: plain ones, adapted by lorakit, or adapted by `peft`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.layering.operands import operand, resolved
from lorakit.core.routes.forwards import Forwards
from lorakit.core.routes.route import Route
from lorakit.ops.adapted import Adapted, factors
from lorakit.speed.peft_layers import is_peft_linear, peft_operand
from lorakit.speed.swapping import FORWARDS


@dataclass(frozen=True)
class Acting:
    """What acts in one call of modules that run as one.

    Attributes:
        operands: Of each module.
        forwards: The forwards of the whole so far.
        route: The route of this one, or None where the model has no adapters of ours.
        again: Autograd runs it again.
    """

    operands: list[Adapted]
    forwards: Forwards
    route: Route | None
    again: bool

    def note(self, y: Tensor) -> None:
        """Remember what the call gave, y (…, d), for a backward that may run it again."""
        if self.route is not None:
            self.forwards.note(y, self.route, self.again)


def acting_in(modules: Sequence[nn.Module], forwards: Forwards, x: Tensor) -> Acting | None:
    """What acts in modules that one call runs through, or None where one of them has nothing that can be used.

    Args:
        modules: Linear modules, with adapters or without.
        forwards: The forwards of the whole so far.
        x: What the call got, (…, in).

    Raises:
        RouteError: Autograd runs the call again, and its first route cannot be known.
    """
    route, again = resolved(modules, forwards)
    operands = _operands(modules, route, x)
    if operands is not None:
        return Acting(operands, forwards, route, again)
    if route is not None and not torch.is_grad_enabled():  # a reentrant checkpoint may ask here which run came first
        forwards.note(None, route, again)
    return None


def forwards_of(module: nn.Module) -> Forwards:
    """The forwards of a module with a stand-in; made when first asked for."""
    forwards: Forwards = module.__dict__.setdefault(FORWARDS, Forwards())
    return forwards


def _operands(modules: Sequence[nn.Module], route: Route | None, x: Tensor) -> list[Adapted] | None:
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
