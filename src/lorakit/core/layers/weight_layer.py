"""`WeightLayer`: a layer whose factors change a weight for the duration of one forward pass.

The layer is used where a weight's input is not accessible: for bare parameters, fused experts and
nn.MultiheadAttention. Each forward pass computes the dense sum W₀ + s·B·A for every adapted weight; the module itself
is not changed.

Fused experts in transformers do not need the dense sum. A decorator marks their class, and a few attributes of each
instance describe the computation: the projections, their layout, biases, gate and norm. For a module with these
attributes, `experts_forward` runs the forward pass and applies dropout, A and B to the tokens of each expert. This file
only reads the attributes; it does not import transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.kinds import per_expert
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.routing.route import BASE, Route
from lorakit.core.variants import Factor
from lorakit.errors import MixedRowsError
from lorakit.ops.grouped_linear import GroupedLinear, GroupedLowRank, grouped_linear

MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "num_experts")
"""Attributes that determine what a fused-experts module computes in its forward pass."""

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def shows_tokens(module: nn.Module, parameter: str = "down_proj") -> bool:
    """Return whether a module's forward computation is known, so that factors can be applied to each expert's tokens.

    Args:
        module: A module of the base model.
        parameter: Name of the adapted parameter.
    """
    if parameter not in PROJECTIONS or not all(hasattr(module, mark) for mark in MARKS):
        return False
    first, activation = ("gate_up_proj", "_apply_gate") if module.has_gate else ("up_proj", "act_fn")
    held = [module._parameters.get(name) for name in (first, "down_proj")]
    return (
        callable(getattr(module, activation, None))
        and parameter in (first, "down_proj")
        and not getattr(module, "_is_expert_parallel", False)
        and all(weight is not None and weight.ndim == 3 and weight.is_floating_point() for weight in held)
    )


def experts_forward(
    module: nn.Module,
    factors: Mapping[str, Sequence[Factor]],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run a forward pass of fused experts with the active adapters' factors at each projection.   [docs/math.md (92)]

    Args:
        module: The experts module, with the weights to use.
        factors: Name of a parameter -> its factors, with A (experts, r, in) and B (experts, out, r).
        hidden_states: Input to the experts module, (tokens, d).
        top_k_index: Indices of each token's experts, (tokens, k).
        top_k_weights: Routing weights of these experts, (tokens, k).

    Returns:
        The output, (tokens, d). Extra cost: 2·r·(in + out) FLOPs per token, expert and projection; no dense weight is
        formed.
    """
    first, name = ("gate_up_proj", "_apply_gate") if module.has_gate else ("up_proj", "act_fn")
    activation: Callable[[Tensor], Tensor] = getattr(module, name)
    chosen, per_token = top_k_index.flatten(), top_k_index.shape[1]
    order = chosen.argsort(stable=True)  # the tokens of the first expert, then those of the second, and so on
    token = order // per_token
    counts = torch.bincount(chosen, minlength=len(getattr(module, first))).tolist()
    h = _project(module, first, hidden_states[token], counts, factors.get(first, ()))
    y = _project(module, "down_proj", activation(h), counts, factors.get("down_proj", ()))
    if module.has_post_expert_norm:
        y = module.get_submodule("post_expert_norm")(y)
    y = y * top_k_weights.flatten()[order, None]
    return torch.zeros_like(hidden_states).index_add_(0, token, y.to(hidden_states.dtype))


def _project(module: nn.Module, name: str, x: Tensor, counts: Sequence[int], factors: Sequence[Factor]) -> Tensor:
    """Return the projection (rows, out) of the rows x (rows, in), which are sorted by expert, with the factors."""
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    linear = GroupedLinear(getattr(module, name), bias, bool(module.is_transposed))
    low = [GroupedLowRank(factor.A, factor.B, factor.scale) for factor in factors]
    dropped = [factor.dropout(x) for factor in factors]
    y = grouped_linear(x, counts, linear, [one for one, z in zip(low, dropped, strict=True) if z is x])
    for one, z in zip(low, dropped, strict=True):
        if z is not x:
            y = y + grouped_linear(z, counts, None, [one])
    return y


class WeightLayer(LoraLayer):
    """A layer that adds low-rank updates to one weight of a base module; other layers may already wrap the module."""

    def adapted(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a clone of the owner, in which the adapted weights include the updates, and return its output.

        Args:
            route: The active adapters.
            args: Passed to the owner.
            kwargs: Passed to the owner.

        Raises:
            MixedRowsError: Rows of the batch use different adapters.
            RouteError: The route does not match the batch.
        """
        if route.rows is not None:
            alone = self.without_rows(route)
            self._check_rows(route, args, kwargs)
            route = alone
        owner = self.owner
        tensors: dict[str, Tensor] = {}
        factors: dict[str, list[Factor]] = {}
        for layer in self.chain():
            weight, factors[layer.spec.parameter] = layer.beside_tokens(route)
            if weight is not None:
                tensors[layer.spec.parameter] = weight
        clone = clone_with(owner, tensors)
        for child in self.kind.inner:
            inside = owner._modules[child]
            if isinstance(inside, WeightLayer) and (weight := inside.effective(route)) is not None:
                clone._modules[child] = clone_with(inside.base_layer, {"weight": weight})
        if any(factors.values()):
            return experts_forward(clone, factors, *args, **kwargs)
        return clone(*args, **kwargs)

    def without_rows(self, route: Route) -> Route:
        """Return a route with the same adapters for the whole batch.

        Args:
            route: A route, which may have one adapter per row.

        Raises:
            MixedRowsError: Rows of the batch use different adapters.
        """
        if route.rows is None:
            return route
        if len(set(route.rows)) > 1:
            raise MixedRowsError(
                f"The rows of this batch use different adapters, but a {self.kind_name} has one weight for all "
                "rows. Run the rows of each adapter separately with `use`, or do not adapt the module.",
                what=self.kind_name,
            )
        return Route(tuple(filter(None, route.rows[:1])))

    def _check_rows(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Reject a route that does not match the batch, if the batch axis is known; unbatched input has one row."""
        x, axis = args[0] if args else next(iter(kwargs.values()), None), self.kind.row_axis(self.owner)
        if isinstance(x, Tensor) and axis is not None:
            self._row_axis(route, x if x.ndim > 2 else x.unsqueeze(axis))

    def chain(self) -> Iterator[WeightLayer]:
        """Yield this layer and all nested layers around the same owner, outermost first."""
        layer: nn.Module = self
        while isinstance(layer, WeightLayer):
            yield layer
            layer = layer.base_layer

    def effective(self, route: Route) -> Tensor | None:
        """Return the weight with a route's adapters applied, in its stored layout.

        Args:
            route: The adapters that are active on all rows.

        Returns:
            The weight in its stored layout, such as (out, in), or None if the module already holds it. Gradients flow
            to A and B.
        """
        names = [name for name in route.names if name in self.r]
        if frozenset(names) == self.inside() == frozenset(self.merged_adapters):
            return None
        self.check_kept()
        with torch.autocast(self.base.device(self.owner, self.spec.parameter).type, enabled=False):
            W = self.read()
            moved = next((name for name in names if name in self.moved_by), None)
            total = W if moved is None else self.read(moved)
            for name in names:
                total = total + self.addition(name, W, self.training)
            stored: Tensor = self.base.write(self.owner, self.original(), total)
        return stored

    def beside_tokens(self, route: Route) -> tuple[Tensor | None, list[Factor]]:
        """Return the weight to use, and the factors that must be applied separately to each expert's tokens.

        Args:
            route: The adapters that are active on all rows.

        Returns:
            The weight, (experts, …, …), or None if the module already holds it; and a possibly empty list of factors.
        """
        names = [name for name in route.names if name in self.r]
        drops = any(isinstance(self.lora_dropout[name], nn.Dropout) for name in names)
        whole = torch.compiler.is_compiling() and not drops  # each expert's number of tokens varies
        if whole or self.moved_by or not shows_tokens(self.owner, self.spec.parameter):
            return self.effective(route), []
        merged = self.inside() <= set(names)
        beside = [name for name in names if not merged or name not in self.merged_adapters]
        weight = None if merged else self.effective(BASE)
        factors = [self.factor(name).plain(self.training) for name in beside]
        apart = [(factor, per_expert(self.spec, factor.A, factor.B)) for factor in factors]
        return weight, [replace(factor, A=A, B=B) for factor, (A, B) in apart]
