"""What a fused op needs of a site: the base's weight and the one plain adapter that acts there, or nothing at all.

A layer that is anything but plain under the route (several adapters, mixed rows, DoRA, a quantised or merged base,
somebody's hooks) gives None, and is called as a module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.watched import is_watched, share_dropped
from lorakit.core.routes.forwards import Forwards
from lorakit.core.routes.route import Route
from lorakit.core.routes.routing import resolve
from lorakit.ops.linear import Adapted, LowRank


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
    if factor.variant != "plain" or factor.bias is not None or module.kind.acts_on != "input":
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
    if not is_linear and not (kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"):
        return None
    weight: Any = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.requires_grad:
        return None
    bias: Any = module._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return None
    return Adapted(weight, bias, None, not is_linear)
