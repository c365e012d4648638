"""Subclasses of `LoraLayer`, one per kind, with the class names that PEFT users expect in `isinstance` and `repr`.

A `WeightLayer` changes a weight for the duration of one forward pass. It is used where a weight's input is not
accessible: for bare parameters, fused experts and nn.MultiheadAttention. Each forward pass computes the dense sum
W₀ + s·B·A for every adapted weight; the module itself is not changed. Fused experts in transformers do not need the
dense sum if their source is known (`experts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.choices import ATTENTION, CONVOLUTIONS, DENSE, EMBEDDING, INNER_LINEAR, PARAMETER
from lorakit.core.clones import clone_with
from lorakit.core.kinds import Kind, per_expert
from lorakit.core.kinds.kind import WeightSpec
from lorakit.core.layers.experts import PROJECTIONS, KnownExperts, experts_forward
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.routing.route import BASE, Route
from lorakit.core.routing.state import AdapterState, resolve
from lorakit.core.variants import Factor
from lorakit.errors import ConfigError, MixedRowsError, ModelError


class WeightLayer(LoraLayer):
    """A layer that adds low-rank updates to one weight of a base module; other layers may already wrap the module."""

    experts: KnownExperts

    def __init__(self, base_layer: nn.Module, kind: Kind, spec: WeightSpec, state: AdapterState) -> None:
        super().__init__(base_layer, kind, spec, state)
        self.__dict__["experts"] = KnownExperts()

    def adapted(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a clone of the owner, in which the adapted weights include the updates, and return its output.

        Raises:
            MixedRowsError: Rows of the batch use different adapters.
            RouteError: The route does not match the batch.
            ModelError: An adapter has dropout, and the input of its weight is not accessible anymore.
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
        """Return a route with the same adapters for all rows; raise a MixedRowsError if they differ."""
        if route.rows is None:
            return route
        if len(set(route.rows)) > 1:
            text = f"Rows use different adapters, but a {self.kind_name} has one weight for all rows; `use` one."
            raise MixedRowsError(text, what=self.kind_name)
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
        """Return the weight with a route's adapters applied, in its stored layout such as (out, in).

        None means that the module already holds it. Gradients flow to A and B.
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

        The weight is (experts, …, …), or None if the module already holds it.

        Raises:
            ModelError: An adapter has dropout, and the input of its weight is not accessible anymore.
        """
        names = [name for name in route.names if name in self.r]
        drops = any(isinstance(self.lora_dropout[name], nn.Dropout) for name in names)
        if not self._sees_tokens(drops):
            if drops and self.training:
                raise self._hidden_input(names)
            return self.effective(route), []
        merged = self.inside() <= set(names)
        beside = [name for name in names if not merged or name not in self.merged_adapters]
        weight = None if merged else self.effective(BASE)
        factors = [self.factor(name).plain(self.training) for name in beside]
        apart = [(factor, per_expert(factor.A, factor.B, self.spec.experts)) for factor in factors]
        return weight, [replace(factor, A=A, B=B) for factor, (A, B) in apart]

    def _sees_tokens(self, drops: bool) -> bool:
        """Return whether factors are applied to the tokens of each expert in this call."""
        if self.spec.parameter not in PROJECTIONS or self.moved_by:
            return False
        if torch.compiler.is_compiling() and not drops:
            return False  # each expert's number of tokens varies
        return self.experts.runs(self.owner)

    def why_dense(self) -> str:
        """Return why factors are not applied to the tokens of each expert now, or ""."""
        if self.spec.parameter not in PROJECTIONS:
            return f"only the forward of {type(self.owner).__name__} sees the input of {self.spec.parameter}"
        if self.experts.runs(self.owner):
            return ""
        return self.experts.why or f"{type(self.owner).__name__} has hooks, or its functions or settings were replaced"

    def _hidden_input(self, names: list[str]) -> ModelError:
        kind, why = type(self.owner).__name__, self.why_dense()
        text = f"lora_dropout cannot be applied to {self.spec.parameter} of {kind}, because {why}."
        return ModelError(text, what=names, where=kind, field="lora_dropout")


class Linear(LoraLayer):
    """A `LoraLayer` for a dense layer (nn.Linear or transformers' Conv1D)."""


class Embedding(LoraLayer):
    """A `LoraLayer` for an nn.Embedding."""


class Conv1d(LoraLayer):
    """A `LoraLayer` for an nn.Conv1d."""


class Conv2d(LoraLayer):
    """A `LoraLayer` for an nn.Conv2d."""


class Conv3d(LoraLayer):
    """A `LoraLayer` for an nn.Conv3d."""


class MultiheadAttention(WeightLayer):
    """A `LoraLayer` for the input projection of an nn.MultiheadAttention."""

    @property
    def out_proj(self) -> nn.Module:
        """The output projection without adapters, as in PEFT; `base_layer.out_proj` is its adapted layer."""
        projection = self.base_layer.get_submodule("out_proj")
        return projection.get_base_layer() if isinstance(projection, LoraLayer) else projection

    def _restore_weights(self) -> None:
        """Do nothing: PEFT's method undoes merges made during a forward pass, but lorakit makes none."""


class InnerLinear(WeightLayer):
    """A `LoraLayer` for a dense layer whose weight is read directly by its parent module."""

    @property
    def weight(self) -> Tensor:
        """The weight with the updates of the active adapters, (out, in), which the parent module reads."""
        route, again = resolve(self.state, self.own_route, self.forwards)
        effective = self.effective(self.without_rows(route))
        if effective is None:
            effective = self.base_layer.get_parameter("weight")
        self.forwards.note(effective, route, again)
        return effective

    def _get_name(self) -> str:
        return super()._get_name().replace("InnerLinear", "Linear")


class ParamWrapper(WeightLayer):
    """A `LoraLayer` for a bare parameter of a module."""

    @property
    def parameter_name(self) -> str:
        """Name of the parameter in the module."""
        return self.spec.parameter

    def extra_repr(self) -> str:
        """Return the parameter's name for `repr`, because several layers can wrap one module."""
        return f"parameter_name={self.parameter_name!r},"


LAYERS: Mapping[str, type[LoraLayer]] = {
    **dict.fromkeys(DENSE, Linear),
    EMBEDDING: Embedding,
    **dict(zip(CONVOLUTIONS, (Conv1d, Conv2d, Conv3d), strict=True)),
    ATTENTION: MultiheadAttention,
    PARAMETER: ParamWrapper,
    INNER_LINEAR: InnerLinear,
}
"""Name of a kind -> layer class."""


def layer_class(kind: Kind) -> type[LoraLayer]:
    """Return the layer class for a kind: its `layer`, which is a LoraLayer or a ConfigError, or its entry in LAYERS."""
    own = kind.layer or LAYERS.get(kind.name)
    if own is None:
        return WeightLayer if kind.acts_on == "weight" else LoraLayer
    if not issubclass(own, LoraLayer):
        raise ConfigError.of("kinds", own.__name__, f"a subclass of LoraLayer, for the layers of {kind.name}")
    return own
