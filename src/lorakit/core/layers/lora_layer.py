"""The weight that a site's adapters see, read once in a forward however many of them ask.

Reading a quantised weight multiplies it out whole. Nothing is kept beyond the forward: a weight can be written in ways
that leave no trace (`.data`), and a norm of another weight would be wrong in silence.

`LoraLayer`: a base module with the factors of any number of adapters beside it.

The arithmetic of LoRA is here, once, for every kind and variant: y = y₀ + Σ addition. The layer asks the state
which adapters act, the kind for the half-products, the variant for the addition, and the base row for W.
It never writes to the base: merging does, and the layer only knows what is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import bare, with_forward
from lorakit.core.factor import HOLDERS, TRAINED, OwnWeight, carrier
from lorakit.core.kinds import Kind, Slot, kind_named, spread
from lorakit.core.layers.adapter_component import Switched
from lorakit.core.layers.batched import add_kept, add_stacked
from lorakit.core.quantization import Base, base_of
from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState, resolve
from lorakit.core.variants import NO_SETTING, NO_TENSORS, At, Factor, Setting, own_tensors, variant_named
from lorakit.errors import MergeError, RowCountError

Weights = dict["str | None", Tensor]
"""What was read in one forward of one site: the adapter that moved the base, or None, -> weight."""


def read_once(layer: Any, name: str, found: Weights) -> Tensor:
    """The canonical weight (out, in) as an adapter sees it: one whose init moved the base has a base of its own.

    Args:
        layer: The site's `LoraLayer`.
        name: The adapter.
        found: What was read in this forward, which is added to.
    """
    own = name if name == layer.moved_by else None
    if own not in found:
        found[own] = layer.read(own)
    return found[own]


SET_ASIDE = frozenset({"kept", "moved", "tied_weight"})  # what a base stored or shall store, in whatever form

OF_THE_BASE = frozenset({"weight", "bias"})
"""Attributes that, when set on the layer, belong to the base module: other code ties weights that way."""


def _holder_type(name: str) -> type[nn.ModuleDict | nn.ParameterDict] | None:
    """Return what holds an attribute of that name by adapter, or None where no adapter has such an attribute."""
    if not name.startswith("lora_"):
        return None
    own = next((tensor for tensor in own_tensors() if tensor.held_as == name), None)
    if own is not None:
        return nn.ModuleDict if own.carried == "module" else nn.ParameterDict
    return HOLDERS.get(name)


class LoraLayer(Switched):
    """A base module and the low-rank factors beside it.

    Attributes:
        base_layer: The module that stood here, untouched.
        lora_A: Adapter -> carrier of A, (r, in).
        lora_B: Adapter -> carrier of B, (out, r).
        lora_embedding_A: Adapter -> A of an embedding, (r, V).
        lora_embedding_B: Adapter -> B of an embedding, (d, r).
        lora_dropout: Adapter -> dropout before A.
        r: Adapter -> rank.
        lora_alpha: Adapter -> alpha.
        scaling: Adapter -> scale.
        variant: Adapter -> name of the entry of VARIANTS, whose own tensors are held likewise (`OwnTensor.held_as`).
        settings: Adapter -> what its config asks of the variant here; adapters without any are not in it.
        merged_adapters: Adapters that are written into the base weight now.
        slot: The weight that the factors belong to.
        moved_by: The adapter whose init moved the base weight (PiSSA and its like), or None.
        replaced: The base's quantised module, where a dense one stands in its place since a merge; else empty.
    """

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    variant: dict[str, str]
    settings: dict[str, Setting]
    trains: dict[str, frozenset[str]]
    merged_adapters: list[str]
    kept: Any = None  # what the base stored before anything was written to it
    moved_by: str | None = None
    moved: Any = None  # what the base stores for the adapter that moved it
    initial: tuple[Tensor, Tensor] | None = None  # that adapter's A and B before training, in main memory
    replaced: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no child
    kept_bias: Tensor | None = None  # the base's bias from before a merge wrote to it (`lora_bias`)
    tied_weight: nn.Parameter | None  # what the base shared with others before a merge untied it
    own_route: Route | None = None  # this layer's exception to the model's default
    old_bias: tuple[str, Tensor] | None = None  # who trains the base's bias, and what it was before
    kind_name: str
    slot: Slot
    forwards: Forwards

    def __init__(self, base_layer: nn.Module, kind: Kind, slot: Slot, state: AdapterState) -> None:
        super().__init__()
        self.base_layer = base_layer
        tables: dict[str, Any] = {name: {} for name in ("r", "lora_alpha", "scaling", "variant", "settings", "trains")}
        lists: dict[str, Any] = {"merged_adapters": [], "tied_weight": None, "forwards": Forwards()}
        # hundreds of layers are made at once, and torch's own way to set an attribute is slow
        self.__dict__.update(tables, training=base_layer.training, state=state, kind_name=kind.name, slot=slot, **lists)
        state.join(self)

    def _get_name(self) -> str:
        merged = f"[merged: {', '.join(self.merged_adapters)}]" if self.merged_adapters else ""
        return f"lora.{type(self).__name__}{merged}"  # what `repr` shows, so that a site is told from its base

    @property
    def kind(self) -> Kind:
        """The row of KINDS."""
        return kind_named(self.kind_name, self.state.kinds)

    @property
    def owner(self) -> nn.Module:
        """The base's own module: where a module has several adapted weights, their layers stand around each other."""
        module: Any = self._modules["base_layer"]  # without torch's slow way to an attribute: all ask for this
        while isinstance(module, LoraLayer):
            module = module._modules["base_layer"]
        return module

    @property
    def source(self) -> nn.Module:
        """The module that holds the base's weight: the owner, or the one that a dense module has replaced."""
        return self.replaced[0] if self.replaced else self.owner

    @property
    def base(self) -> Base:
        """The row of BASES."""
        return base_of(self.source, self.slot.parameter, self.slot.as_stored)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            made = _holder_type(name)
            if made is not None:
                holder = self._modules[name] = made()
                return holder
            return getattr(super().__getattr__("base_layer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_THE_BASE:
            setattr(self.base_layer, name, value)
        elif name in SET_ASIDE:  # a quantised weight is a parameter, and one set aside is none of this layer's
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def available_adapters(self) -> list[str]:
        """Adapters that have a factor here."""
        return list(self.r)

    def set_trained(self, name: str, trained: bool) -> None:
        """Train an adapter's factor, or freeze it; what its init says is never trained stays frozen.

        Args:
            name: The adapter; one that has nothing here is no matter.
            trained: Its parameters require gradients.
        """
        super().set_trained(name, trained)
        for own in variant_named(self.variant[name]).tensors if name in self.r else ():
            if not own.trained:
                self._own(name, own.held_as).requires_grad_(False)
        for part in () if len(self.trains.get(name, "AB")) == 2 else {"A", "B"} - self.trains[name]:
            if (tensor := getattr(self.factor(name), part)).is_leaf:  # else it is another layer's, which freezes it
                tensor.requires_grad_(False)

    def put(self, name: str, factor: Factor, r: int, lora_alpha: float, trains: frozenset[str]) -> None:
        """Add an adapter's factor.

        Args:
            name: The adapter.
            factor: Its A (r, in), B (out, r) and the rest; A, B and the variant's own tensors are parameters.
            r: Its rank.
            lora_alpha: Its alpha.
            trains: Which of "A" and "B" are trained.
        """
        kind = self.kind
        down, up = (getattr(self, attribute) for attribute in kind.names)
        made: Any = factor
        A, B, bias = made.A, made.B, made.bias
        down[name], up[name] = (carrier(A), carrier(B, bias)) if kind.on_disk else (A, B)
        self.lora_dropout[name] = factor.dropout
        for own in factor.variant.tensors:
            tensor: Any = factor.own[own.held_as]
            getattr(self, own.held_as)[name] = OwnWeight(tensor) if own.carried == "module" else tensor
        for attribute in (*HOLDERS, *factor.own):
            held: Any = self._modules.get(attribute)
            if held is not None and name in held:  # new modules take the mode of what they stand on
                for new in (held, *filter(None, [held._modules.get(name)])):
                    if new.training is not self.training:
                        new.train(self.training)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name], self.variant[name], self.trains[name] = factor.scale, factor.variant.name, trains
        if factor.setting:
            self.settings[name] = factor.setting

    def remove(self, name: str) -> None:
        """Drop an adapter's factor; one that is not here is no matter."""
        for attribute in (*HOLDERS, *(own.held_as for own in own_tensors())):
            holder: Any = self._modules.get(attribute)
            if holder is not None and name in holder:
                del holder[name]
        for table in (self.r, self.lora_alpha, self.scaling, self.variant, self.settings, self.trains):
            table.pop(name, None)
        self.drop_exception(name)

    def factor(self, name: str) -> Factor:
        """The one accessor of A and B: everything that computes with them asks here.

        Args:
            name: An adapter that has a factor here.

        Returns:
            The factor, with A (r, in) and B (out, r).
        """
        first, second = (getattr(self, attribute)[name] for attribute in self.kind.names)
        A, B, bias = (first.weight, second.weight, second.bias) if self.kind.on_disk else (first, second, None)
        variant, own, setting = variant_named(self.variant[name]), NO_TENSORS, NO_SETTING
        if not variant.is_lora:
            own = {tensor.held_as: self._own(name, tensor.held_as) for tensor in variant.tensors}
            setting = self.settings.get(name, NO_SETTING)
        return Factor(A, B, self.scaling[name], self.lora_dropout[name], variant, own, bias, setting)

    def _own(self, name: str, held_as: str) -> nn.Parameter:
        """One of the variant's own tensors of an adapter, in its shape there (…)."""
        held: Any = self._modules[held_as][name]  # type: ignore[index]
        return held if isinstance(held, Tensor) else held.weight  # type: ignore[return-value]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter here, A and B first, (…); none where it has no factor."""
        found: list[Any] = []
        own = (tensor.held_as for tensor in variant_named(self.variant[name]).tensors) if name in self.r else ()
        for holder in map(self._modules.get, (*TRAINED, *own)):
            if holder is not None:
                inside = holder._modules.get(name)
                for tensor in (holder._parameters.get(name),) if inside is None else inside._parameters.values():
                    if tensor is not None:
                        found.append(tensor)
        return found

    def read(self, name: str | None = None) -> Tensor:
        """The base weight without anything merged, canonical (out, in), fp32 or wider.

        Args:
            name: As this adapter sees it: one whose init moved the base has a base of its own.
        """
        stored = self.moved_base() if name is not None and name == self.moved_by else self.original()
        return self.base.read(self.source, stored)

    def original(self) -> Any:
        """What the base stored before anything was written to it, on the base's device and in its dtype."""
        return self._as_now(self.kept)

    def moved_base(self) -> Any:
        """What the base stores for the adapter that moved it, on the base's device and in its dtype."""
        return self._as_now(self.moved if self.merged_adapters else None)

    def _as_now(self, stored: Any) -> Any:
        now = self.base.stored(self.source, self.slot.parameter)
        if stored is None or not isinstance(stored, Tensor) or self.base.quantised:
            return now if stored is None else stored
        return stored.to(device=now.device, dtype=now.dtype)

    def original_bias(self) -> Tensor | None:
        """The base's bias, (out,), without anything merged, or None."""
        now = getattr(self.owner, "bias", None)
        bias = now if self.kept_bias is None or now is None else self.kept_bias.to(now.device, now.dtype)
        return bias if isinstance(bias, Tensor) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output plus what the active adapters add.

        Args:
            args: What the base module takes: first (…, in), or indices (…) for an embedding.
            kwargs: Passed to the base module.

        Returns:
            What the base module returns, (…, out), in its dtype.

        Raises:
            RouteError: The active route cannot be known, or does not fit this batch.
            MergeError: What is merged is not wanted here, and the base's bits were not kept.
        """
        route, again = resolve(self.state, self.own_route, self.forwards)
        if not self.merged_adapters and self.moved_by is None and route.mentions.isdisjoint(self.r):
            y = self.base_layer(*args, **kwargs)
        else:
            y = self.adapted(route, args, kwargs)
        if not torch.compiler.is_compiling():
            self.forwards.note(y, route, again)
        return y

    def adapted(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The base's output y₀ (…, out) and, for the adapters of a route, A and B beside it.

        Args:
            route: Which adapters act.
            args: What the base module takes, x (…, in) first.
            kwargs: Likewise.

        Raises:
            RouteError: The route does not fit this batch.
        """
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        stays = route.common_to_all(inside := self.inside())
        skip = frozenset(self.merged_adapters) if stays else frozenset()
        y0 = self.base_layer(*args, **kwargs) if stays else self._base_of_rows(route, x, args, kwargs)
        if route.kept is not None and not inside and (y := add_kept(self, route, x, y0)) is not None:
            return y
        if route.rows is not None:
            return self._mixed(route, skip, x, y0)
        weights: Weights = {}  # not as a call of its type, which dynamo cannot trace
        y, moved = y0, self.moved_by in route.names
        for name in [name for name in route.names if name in self.r and name not in skip]:
            own = name == self.moved_by
            asks = variant_named(self.variant[name]).output is not None and (bool(skip) or (moved and not own))
            seen = bare(self._base_for(own))(*args, **kwargs) if asks else y0
            y = y + self._addition(name, route, x, seen, weights)
        return y

    def _mixed(self, route: Route, skip: frozenset[str], x: Tensor, y0: Tensor) -> Tensor:
        """Each row of the batch with its own adapter; x (rows, …), y0 (rows, …, out).   [docs/math.md (13)]"""
        axis, weights = self._row_axis(route, x), Weights()
        here = [s for s in route.segments(x.device, x.shape[axis]) if s[0] in self.r and s[0] not in skip]
        y, left = add_stacked(self, here, route, x, y0)
        for name, index in left:
            own = (x.index_select(axis, index), y0.index_select(axis, index))
            y = y.index_add(axis, index, self._addition(name, route.alone(name, index), *own, weights))
        return y

    def _row_axis(self, route: Route, x: Tensor) -> int:
        """The axis of x (rows, …) that holds the rows; a route that does not fit is refused."""
        axis = self.kind.row_axis(self.owner)
        if axis is None or route.rows_of(x.shape[axis]) is None:
            size = "no batch axis" if axis is None else f"{x.shape[axis]} rows"
            raise RowCountError(
                f"The route names {len(route.rows or ())} rows, and a {self.kind_name} received {tuple(x.shape)} with "
                f"{size}. Give one adapter per row of the batch (where rows come again as beams: `copies` of each)."
            )
        return axis

    def _addition(self, name: str, route: Route, x: Tensor, y0: Tensor, weights: Weights) -> Tensor:
        """What one adapter adds: x (…, in) or indices (…), y0 (…, out) -> (…, out) like y0.   [docs/math.md (2)]"""
        kind, factor, dtype = self.kind, self.factor(name), y0.dtype
        variant = factor.variant
        if kind.drops:
            x = factor.dropout(x.to(dtype))
        A, B = (factor.A, factor.B) if variant.factors is None else variant.factors(factor, self.training)
        module = self.source if self.replaced else self.base_layer
        h = kind.down(module, x, A.to(dtype)) if variant.down is None else variant.down(kind, module, x, factor)
        z = kind.up(module, h * factor.scale, B.to(dtype))  # h is (…, r): the small place to scale
        if factor.bias is not None:
            z = z + spread(factor.bias.to(dtype) * factor.scale, self.slot)
        if variant.output is None:
            return z
        bias, mask = self._bias_under(route.names), route.acting(name)

        def siblings() -> list[Factor]:
            return [self.factor(other) for other in self.r if other != name]

        return variant.output(
            At(y0, bias, z, factor, kind, self.slot, lambda: read_once(self, name, weights), mask, x, siblings)
        )

    def _bias_under(self, names: tuple[str, ...]) -> Tensor | None:
        """The bias, (out,), that the base's output has where these adapters act, or None."""
        bias = self.original_bias()
        if bias is not None and self.old_bias is not None and self.old_bias[0] not in names:
            return self.old_bias[1].to(bias.device, bias.dtype)
        return bias

    def inside(self) -> frozenset[str]:
        """The adapters that the weight in the base's module is right for: merged ones, and one that moved it."""
        return frozenset((*self.merged_adapters, *([self.moved_by] if self.moved_by is not None else [])))

    def _base_for(self, moved: bool) -> nn.Module:
        """The base's module with nothing merged, as the adapter that moved it has it or as it was."""
        if not self.merged_adapters and (moved or self.moved_by is None):
            return self.base_layer
        self.check_kept()
        clone = self.base.clone(self.source, self.slot.parameter, self.moved_base() if moved else self.original())
        if self.kept_bias is not None:
            held: Any = clone._parameters if "bias" in clone._parameters else clone.__dict__
            held["bias"] = self.original_bias()
        return clone

    def _base_of_rows(self, route: Route, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The base's output (rows, …, out) where its module does not hold what all rows see."""
        if self.moved_by is None or self.moved_by not in route.mentions or route.rows is None:
            return self._base_for(self.moved_by in route.mentions)(*args, **kwargs)
        axis = self._row_axis(route, x)
        index = dict(route.segments(x.device, x.shape[axis]))[self.moved_by]

        def forward(*args: Any, **kwargs: Any) -> Tensor:  # each on all rows: hooks read the batch as the route has it
            before, moved = (bare(self._base_for(one))(*args, **kwargs) for one in (False, True))
            return before.index_copy(axis, index, moved.index_select(axis, index))

        y: Tensor = with_forward(self.base_layer, forward)(*args, **kwargs)
        return y

    def addition(self, name: str, W: Tensor, training: bool = False) -> Tensor:
        """What an adapter adds to the weight that it sees when it is written into it.   [docs/math.md (11)]

        Args:
            name: An adapter that has a factor here.
            W: The base weight as `read` gives it, (out, in); one that moved the base sees its own.
            training: The variant may perturb A and B, as in training.

        Returns:
            The addition, like W, with a graph where gradients are on.

        Raises:
            MergeError: It has no place in a weight of this shape.
        """
        factor = self.factor(name)
        if factor.variant.update is None:
            raise MergeError(
                f"{factor.variant.title} has no place in a weight: {factor.variant.unmergeable_reason}.", what=name
            )
        seen = self.read(name) if name == self.moved_by else W
        A, B = factor.multiplied(training)
        delta = self.kind.delta(self.slot, A.to(W.dtype), B.to(W.dtype)) * factor.scale
        return factor.variant.update(self.kind, self.slot, seen, delta, factor)

    def move_base(self, name: str, stored: Any, initial: tuple[Tensor, Tensor] | None) -> None:
        """Put the base weight that the init of adapter `name` made in place, as stored; the original is kept.

        `initial` is the adapter's A (r, in) and B (out, r) before training, where the base became W − s·B·A.
        """
        self.kept = self.original()
        self.moved_by, self.moved = name, stored
        self.initial = initial and (initial[0].detach().to("cpu", copy=True), initial[1].detach().to("cpu", copy=True))
        self.base.place(self.owner, self.slot.parameter, stored)

    def check_kept(self) -> None:
        """Refuse to go back to a base whose bits were given up.

        Raises:
            MergeError: Something is merged and the original was not kept.
        """
        if self.merged_adapters and self.kept is None and not self.replaced:
            raise MergeError(
                f"{', '.join(self.merged_adapters)} is merged into the base and its bits were not kept "
                "(keep_base=False), so the base alone and other adapters cannot be had. Merge with keep_base=True, "
                "or load the base anew."
            )
