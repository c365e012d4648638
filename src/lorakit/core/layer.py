"""`LoraLayer`: a base module with the factors of any number of adapters beside it.

The arithmetic of LoRA is here, once, for every kind and variant: y = y₀ + Σ addition. The layer asks the state
which adapters act, the kind for the half-products, the variant for the addition, and the base row for W.
It never writes to the base: merging does, and the layer only knows what is merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.bases import base_of
from lorakit.core.factor import Factor, FactorWeight, Magnitude
from lorakit.core.kinds import Kind, kind_named
from lorakit.core.routing import AdapterState, Forwards, Route, resolve
from lorakit.core.variants import variant_named
from lorakit.errors import MergeError, RouteError

HOLDERS: Mapping[str, type[nn.ModuleDict | nn.ParameterDict]] = {
    "lora_dropout": nn.ModuleDict,
    "lora_A": nn.ModuleDict,
    "lora_B": nn.ModuleDict,
    "lora_embedding_A": nn.ParameterDict,
    "lora_embedding_B": nn.ParameterDict,
    "lora_magnitude_vector": nn.ModuleDict,
}
"""Attributes that hold something per adapter; each is made when it is first asked for, since most layers need three."""

OF_THE_BASE = frozenset({"weight", "bias"})
"""Attributes that, when set on the layer, belong to the base module: other code ties weights that way."""


class LoraLayer(nn.Module):
    """A base module and the low-rank factors beside it.

    Attributes:
        base_layer: The module that stood here, untouched.
        lora_A: Adapter -> carrier of A, (r, in).
        lora_B: Adapter -> carrier of B, (out, r).
        lora_embedding_A: Adapter -> A of an embedding, (r, V).
        lora_embedding_B: Adapter -> B of an embedding, (d, r).
        lora_dropout: Adapter -> dropout before A.
        lora_magnitude_vector: Adapter -> carrier of DoRA's magnitude, (out,).
        r: Adapter -> rank.
        lora_alpha: Adapter -> alpha.
        scaling: Adapter -> scale.
        merged_adapters: Adapters that are written into the base weight now.
    """

    def __init__(self, base_layer: nn.Module, kind: Kind, state: AdapterState) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.variant: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self.kept: Tensor | None = None  # the base weight's bits from before the first merge
        self.tied_weight: nn.Parameter | None = None  # what the base shared with others before a merge untied it
        self.own_route: Route | None = None  # this layer's exception to the model's default
        self.old_bias: tuple[str, Tensor] | None = None  # who trains the base's bias, and what it was before
        self.state = state
        self.kind_name = kind.name
        self.forwards = Forwards()

    def _get_name(self) -> str:
        merged = f"[merged: {', '.join(self.merged_adapters)}]" if self.merged_adapters else ""
        return f"lora.{type(self).__name__}{merged}"  # what `repr` shows, so that a site is told from its base

    @property
    def kind(self) -> Kind:
        """The row of KINDS."""
        return kind_named(self.kind_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            if name in HOLDERS:
                holder = self._modules[name] = HOLDERS[name]()
                return holder
            return getattr(super().__getattr__("base_layer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_THE_BASE:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that the route in force names, as this layer sees it."""
        route = self.state.active() if self.own_route is None else self.own_route
        return list(route.names)

    def set_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Make an exception to the model's default at this layer alone; `activate` on the model ends it.

        Args:
            adapter_names: One adapter or several; none means the base alone.

        Raises:
            RouteError: There is no such adapter on the model.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.state.check(names)
        self.own_route = Route(names)

    def put(self, name: str, factor: Factor, r: int, lora_alpha: float) -> None:
        """Add an adapter's factor.

        Args:
            name: The adapter.
            factor: Its A (r, in), B (out, r) and the rest; A, B and magnitude are parameters.
            r: Its rank.
            lora_alpha: Its alpha.
        """
        kind = self.kind
        holders = [getattr(self, attribute) for attribute in kind.names]
        for holder, weight in zip(holders, (factor.A, factor.B), strict=True):
            holder[name] = FactorWeight(weight) if kind.on_disk else weight  # type: ignore[arg-type]
        self.lora_dropout[name] = factor.dropout
        if factor.magnitude is not None:
            self.lora_magnitude_vector[name] = Magnitude(factor.magnitude)  # type: ignore[arg-type]
        for attribute in HOLDERS:
            held: Any = self._modules.get(attribute)
            if held is not None and name in held:  # new modules take the mode of what they stand on
                held.training = self.training
                if isinstance(held[name], nn.Module):
                    held[name].train(self.training)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name], self.variant[name] = factor.scale, factor.variant

    def remove(self, name: str) -> None:
        """Drop an adapter's factor; one that is not here is no matter."""
        for attribute in HOLDERS:
            holder: Any = self._modules.get(attribute)
            if holder is not None and name in holder:
                del holder[name]
        for settings in (self.r, self.lora_alpha, self.scaling, self.variant):
            settings.pop(name, None)

    def factor(self, name: str) -> Factor:
        """The one accessor of A and B: everything that computes with them asks here.

        Args:
            name: An adapter that has a factor here.

        Returns:
            The factor, with A (r, in) and B (out, r).
        """
        first, second = (getattr(self, attribute)[name] for attribute in self.kind.names)
        A, B = (first.weight, second.weight) if self.kind.on_disk else (first, second)
        vectors: Any = self._modules.get("lora_magnitude_vector", {})
        vector = vectors[name].weight if name in vectors else None
        return Factor(A, B, self.scaling[name], self.lora_dropout[name], self.variant[name], _tensor(vector))

    def read(self) -> Tensor:
        """The base weight without anything merged, canonical (out, in), fp32 or wider."""
        return base_of(self.base_layer).read(self.original_weight())

    def original_weight(self) -> Tensor:
        """The base weight as it is stored, without anything merged, on the base's device: (out, in), or (in, out)."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight if self.kept is None else self.kept.to(device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base's output plus what the active adapters add.

        Args:
            x: What the base module takes: (…, in), or indices (…) for an embedding.
            args: Passed to the base module.
            kwargs: Passed to the base module.

        Returns:
            What the base module returns, (…, out), in its dtype.

        Raises:
            RouteError: The active route cannot be known, or does not fit this batch.
            MergeError: What is merged is not wanted here, and the base's bits were not kept.
        """
        route, again = resolve(self.state, self.own_route, self.forwards)
        if self.merged_adapters or not route.mentions.isdisjoint(self.r):
            y = self._adapted(route, x, args, kwargs)
        else:
            y = self.base_layer(x, *args, **kwargs)
        if not again and not torch.compiler.is_compiling():
            self.forwards.note(y, route)
        return y

    def _adapted(self, route: Route, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        merged = frozenset(self.merged_adapters)
        stays = route.common_to_all(merged)
        module = self.base_layer if stays else self._unmerged_module()
        y0: Tensor = module(x, *args, **kwargs)
        skip = merged if stays else frozenset()
        if route.rows is None:
            y = y0
            for name in route.names:
                if name in self.r and name not in skip:
                    y = y + self._addition(name, route.names, x, y0)
            return y
        return self._mixed(route, skip, x, y0)

    def _mixed(self, route: Route, skip: frozenset[str], x: Tensor, y0: Tensor) -> Tensor:
        """Each row of the batch with its own adapter; x (rows, …), y0 (rows, …, out).   [docs/math.md (13)]"""
        axis = self.kind.row_axis(self.base_layer)
        if axis is None or route.rows_of(x.shape[axis]) is None:
            size = "no batch axis" if axis is None else f"{x.shape[axis]} rows"
            raise RouteError(
                f"The route names {len(route.rows or ())} rows, and a {self.kind_name} received {tuple(x.shape)} with "
                f"{size}. Give one adapter per row of the batch (where rows come again as beams: `copies` of each)."
            )
        y = y0
        for name, index in route.segments(x.device, x.shape[axis]):
            if name in self.r and name not in skip:
                part = self._addition(name, (name,), x.index_select(axis, index), y0.index_select(axis, index))
                y = y.index_add(axis, index, part)
        return y

    def _addition(self, name: str, beside: tuple[str, ...], x: Tensor, y0: Tensor) -> Tensor:
        """What one adapter adds where `beside` act: x (…, in) or indices (…), y0 (…, out) -> (…, out) like y0."""
        kind, factor, dtype = self.kind, self.factor(name), y0.dtype
        if kind.drops:
            x = factor.dropout(x.to(dtype))
        h = kind.down(self.base_layer, x, factor.A.to(dtype)) * factor.scale  # (…, r): the small place to scale
        z = kind.up(self.base_layer, h, factor.B.to(dtype))
        return variant_named(factor.variant).output(y0, self._bias_under(beside), z, factor, self.read)

    def _bias_under(self, names: tuple[str, ...]) -> Tensor | None:
        """The bias, (out,), that the base's output has where these adapters act, or None."""
        if self.old_bias is not None and self.old_bias[0] not in names:
            return self.old_bias[1]
        bias = getattr(self.base_layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def _unmerged_module(self) -> nn.Module:
        if not self.merged_adapters:
            return self.base_layer
        if self.kept is None:
            raise MergeError(
                f"{', '.join(self.merged_adapters)} is merged into the base and its bits were not kept "
                "(keep_base=False), so the base alone and other adapters cannot be had. Merge with keep_base=True, "
                "or load the base anew."
            )
        return clone_with(self.base_layer, {"weight": self.original_weight()})


class Linear(LoraLayer):
    """A `LoraLayer` on a dense layer (nn.Linear or transformers' Conv1D)."""


class Embedding(LoraLayer):
    """A `LoraLayer` on an nn.Embedding."""


LAYERS: Mapping[str, type[LoraLayer]] = {"Linear": Linear, "Conv1D": Linear, "Embedding": Embedding}
"""Kind -> the name that `isinstance` and `repr` show."""


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def clone_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow clone of a module that has some parameters of its own; the module is not touched.

    Args:
        module: Any module.
        tensors: Names of direct parameters -> the tensors that the clone has instead, of the same shapes (…).

    Returns:
        The clone; everything else is shared. It is meant to live for one forward.
    """
    clone = module.__new__(type(module))
    clone.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters)}
    for name, tensor in tensors.items():
        clone._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return clone
