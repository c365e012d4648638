"""What a fused op needs of a site: the base's weight and the one plain adapter that acts there, or nothing at all.

A layer that is anything but plain under the route (several adapters, mixed rows, DoRA, a quantised or merged base,
somebody's hooks) gives None, and is called as a module.

The operands of the LoRA layers that the package `peft` made, told by their attributes; it is not imported.

Everything is asked anew at every call: which adapter is active, whether it is switched off or merged, its scale. What
is anything but one plain adapter gives None, and the layer runs itself.

The operands of linear modules as they act in one call: plain ones, adapted by lorakit, or adapted by `peft`.

The recipe of single adapted linear modules, ours and peft's: base and adapter as one function, x kept once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import PEFT_TABLES_OF_VARIANTS
from lorakit.core.clones import is_watched, share_dropped
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import resolve
from lorakit.ops.adapted import Adapted, LowRank, factors
from lorakit.ops.linear import linears
from lorakit.speed.patching import FORWARDS
from lorakit.speed.submodules import is_usual
from lorakit.targets.layer_types import CONV1D


def operand(module: nn.Module, route: Route | None) -> Adapted | None:
    """The operands of a linear module as it acts under a route.

    Args:
        module: A layer of ours, or a module of the base.
        route: The route of this forward, or None where the model has no adapters.

    Returns:
        W (out, in) or (in, out), bias (out,) and perhaps A (r, in) and B (out, r); None where it is not that simple.
    """
    if is_watched(module):
        return None
    if not isinstance(module, LoraLayer):
        return frozen_linear(module)
    if route is None or route.rows is not None or module.own_route is not None or module.merged_adapters:
        return None
    owner = module.owner
    names = [name for name in route.names if name in module.r]
    if module.base_layer is not owner or is_watched(owner) or len(names) > 1:
        return None
    if not route.common_to_all(module.inside()):
        return None
    found = frozen_linear(owner)
    if found is None or not names:
        return found
    factor = module.factor(names[0])
    if not factor.variant.is_lora or factor.bias is not None or module.kind.acts_on != "input":
        return None
    p = share_dropped(factor.dropout)
    if p is None:
        return None
    return Adapted(found.W, found.bias, LowRank(factor.A, factor.B, factor.scale, p), found.transposed)


def resolved(modules: Iterable[nn.Module], forwards: Forwards) -> tuple[Route | None, bool]:
    """The route that modules which are run as one use now, and whether autograd runs them again.

    Args:
        modules: Some of them may be layers of ours; they belong to one model.
        forwards: The forwards of the whole so far; it takes the place of each layer's own.

    Raises:
        RouteError: It runs again and its first route cannot be known.
    """
    for module in modules:
        if isinstance(module, LoraLayer):
            return resolve(module.state, None, forwards)
    return None, False


def frozen_linear(module: nn.Module) -> Adapted | None:
    """W (out, in), or (in, out) of a Conv1D, and bias (out,) of a module; None where it is no plain, frozen linear one.

    Args:
        module: Any module; who calls has seen to its hooks.
    """
    kind = type(module)
    is_linear = kind.forward is nn.Linear.forward
    if not is_linear and not (kind.__name__ == CONV1D and kind.__module__ == "transformers.pytorch_utils"):
        return None
    weight: Any = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.requires_grad:
        return None
    bias: Any = module._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return None
    return Adapted(weight, bias, None, not is_linear)


FORWARD = ("peft.tuners.lora.layer", "Linear.forward")
"""Module and name of the forward whose arithmetic is known; a stand-in's has the same."""

TABLES = ("lora_A", "lora_B", "lora_dropout", "scaling")
"""What such a layer keeps by adapter."""

ODD_TABLES = ("lora_variant", "lora_bias", *PEFT_TABLES_OF_VARIANTS)
"""Tables, of this peft or of older ones, in which a true entry means that the adapter is not plain."""


def is_peft_linear(module: nn.Module) -> bool:
    """Whether a module is peft's LoRA layer around a linear one."""
    forward: Any = type(module).forward
    return (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")) == FORWARD


def peft_operand(module: Any) -> Adapted | None:
    """The operands of a layer of peft's as it acts now.

    Args:
        module: A module of which `is_peft_linear` is true.

    Returns:
        W (out, in) or (in, out), bias (out,) and perhaps A (r, in) and B (out, r); None where it is not that simple.
    """
    if is_watched(module) or not all(hasattr(module, name) for name in TABLES) or module.merged:
        return None
    base = module.base_layer
    found = None if is_watched(base) else frozen_linear(base)
    names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if found is None or not names:
        return found
    if len(names) > 1 or any(_entry(getattr(module, table, None), names[0]) for table in ODD_TABLES):
        return None
    down, up, dropout = (getattr(module, table)[names[0]] for table in TABLES[:3])
    if any(type(part) is not nn.Linear or is_watched(part) or part.bias is not None for part in (down, up)):
        return None
    p, scale = share_dropped(dropout), module.scaling[names[0]]
    if p is None or not isinstance(scale, (int, float)):
        return None
    return Adapted(found.W, found.bias, LowRank(down.weight, up.weight, float(scale), p), found.transposed)


def _entry(table: Any, name: str) -> bool:
    return bool(table.get(name)) if isinstance(table, dict) else bool(table)


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
