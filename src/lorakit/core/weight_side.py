"""Forwards of sites whose factors act on a weight: the module runs once, as a clone that has W₀ + Σ update.

Where the module's forward is known (fused experts with transformers' marks), its tokens are reached instead and no
dense weight is made. The layers come in as they stand around one module; which adapters act was decided before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.core.cloning import clone_with
from lorakit.core.experts import ExpertFactor, expert_factor, experts_forward, shows_tokens
from lorakit.core.routing import Route
from lorakit.errors import RouteError

if TYPE_CHECKING:
    from lorakit.core.layer import LoraLayer


def for_all_rows(route: Route, kind: str) -> Route:
    """The route as one for all rows, which is what a weight can have.

    Args:
        route: Any route.
        kind: Name of the kind of site, for the message.

    Raises:
        RouteError: Its rows differ.
    """
    if route.rows is None:
        return route
    if len(set(route.rows)) > 1:
        raise RouteError(
            f"The rows of this batch have different adapters, and a {kind} has one weight for all rows. Run the rows "
            "of each adapter on their own with `use`, or leave the module out of them."
        )
    return Route(tuple(filter(None, route.rows[:1])))


def run_owner(
    chain: Sequence[LoraLayer],
    children: Mapping[str, LoraLayer],
    route: Route,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The module under a chain of layers, once, with what the active adapters add.

    Args:
        chain: The layers around it.
        children: Layers inside it whose weight it reads itself, by the name of the child.
        route: Which adapters act, on all rows.
        args: What the module takes, any shape.
        kwargs: Likewise.

    Returns:
        What the module returns.
    """
    owner = chain[0].owner
    tensors: dict[str, Tensor] = {}
    factors: dict[str, list[ExpertFactor]] = {}
    for layer in chain:
        parameter = layer.slot.parameter
        if _on_tokens(layer, route):
            weight, beside = _beside_tokens(layer, route)
            factors[parameter] = beside
        else:
            weight = layer.effective(route)
        if weight is not None:
            tensors[parameter] = weight
    clone = clone_with(owner, tensors)
    for child, inside in children.items():
        weight = inside.effective(route)
        if weight is not None:
            clone._modules[child] = clone_with(inside.base_layer, {"weight": weight})
    if any(factors.values()):
        return experts_forward(clone, factors, *args, **kwargs)
    return clone(*args, **kwargs)


def _on_tokens(layer: LoraLayer, route: Route) -> bool:
    """Whether the layer's factors act on its experts' tokens; a graph that is compiled whole takes the weight."""
    if layer.moved_by is not None or not shows_tokens(layer.owner, layer.slot.parameter):
        return False
    names = [name for name in route.names if name in layer.r]
    drops = any(isinstance(layer.lora_dropout[name], nn.Dropout) for name in names)
    return drops or not torch.compiler.is_compiling()


def _beside_tokens(layer: LoraLayer, route: Route) -> tuple[Tensor | None, list[ExpertFactor]]:
    """The weight that shall lie in the module, None where it lies so already, and the factors beside it."""
    merged = frozenset(layer.merged_adapters)
    names = [name for name in route.names if name in layer.r]
    if merged <= set(names):
        return None, [expert_factor(layer.slot, layer.factor(name)) for name in names if name not in merged]
    return layer.effective(Route()), [expert_factor(layer.slot, layer.factor(name)) for name in names]
