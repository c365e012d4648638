"""`LoraLayer`: a base module with the factors of any number of adapters.

This file implements the arithmetic of LoRA for every layer kind and LoRA variant: y = y₀ + Σ addition. The state
determines which adapters are active, the kind applies A and B, the variant computes the addition, and the weight format
reads W. A forward pass never writes to the base; only `BaseWeight` does, when adapters are merged.

A forward pass reads the weight only once, even if several adapters need it, because reading a quantized weight
dequantizes all of it. Nothing is cached across forward passes: writes through `.data` cannot be detected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import ModuleDict, ParameterDict

from lorakit.config import scale
from lorakit.core.clones import bare, with_forward
from lorakit.core.factor import HOLDERS, TRAINED, BufferDict, own_container, parameter, put_own, weight_holder
from lorakit.core.kinds.kind import Kind, WeightSpec, spread
from lorakit.core.layers.adapter_component import MergeOptions, TunerLayer, trainable_tensors
from lorakit.core.layers.base_weight import BaseWeight
from lorakit.core.layers.batched import add_kept, add_stacked, called_product
from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState, resolve
from lorakit.core.shards import is_own_unit
from lorakit.core.variants import NO_SETTING, NO_TENSORS, At, Factor, OwnTensor, Setting, own_tensors, variant_named
from lorakit.errors import AdapterError, ConfigTypeError, MergeError, warn_caller

Weights = dict["str | None", Tensor]
"""The weights that a site reads in one forward pass.

The key of the original weight is None; the key of a residual base is the first adapter that uses that base.
"""


def _new_holder(name: str) -> nn.Module | None:
    """Return an empty container for an attribute that has one entry per adapter, or None for any other attribute."""
    if not name.startswith("lora_"):
        return None
    own = next((tensor for tensor in own_tensors() if tensor.container == name), None)
    if own is not None:
        return own_container(own.carried, own.member)
    return HOLDERS[name]() if name in HOLDERS else None


def _weight_holders(factor: Factor, A: nn.Parameter, B: nn.Parameter) -> tuple[nn.Module, nn.Module]:
    """Return the modules that hold A (r, in) and B (out, r): those of the variant, or else the usual ones."""
    own = factor.variant.parts.holder or (lambda *_: None)
    first, second = own("A", A, factor.setting), own("B", B, factor.setting)
    return first or weight_holder(A), second or weight_holder(B, factor.bias)


def _held(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a holder's weight (…) and its bias; FSDP gathers the parameters of its units only when they are called."""
    if is_own_unit(module):
        tensors: tuple[Tensor, Tensor | None] = module()
        return tensors
    return module.weight, module.bias  # type: ignore[return-value]


class LoraLayer(BaseWeight, TunerLayer):
    """A base module and the low-rank factors of its adapters.

    Attributes:
        lora_A: Adapter -> module with A, (r, in), as its weight.
        lora_B: Adapter -> module with B, (out, r), as its weight.
        lora_embedding_A: Adapter -> A of an embedding, (r, V).
        lora_embedding_B: Adapter -> B of an embedding, (d, r).
        variant: Adapter -> name of its entry in VARIANTS. Further attributes hold the variants' extra tensors
            (`OwnTensor.held_as`).
        settings: Adapter -> the variant's settings for this layer; adapters without settings have no entry.
        trains: Adapter -> which of its factors, "A" and "B", are trainable.
        memory: Adapter -> tensors that its variant keeps from one forward pass to the next.
        forwards: The layer's forward history, used when autograd recomputes a forward pass.
    """

    lora_alpha: dict[str, float]
    settings: dict[str, Setting]
    trains: dict[str, frozenset[str]]
    memory: dict[str, dict[str, Tensor]]
    own_route: Route | None = None
    forwards: Forwards

    def __init__(self, base_layer: nn.Module, kind: Kind, spec: WeightSpec, state: AdapterState) -> None:
        super().__init__()
        self.base_layer = base_layer
        # hundreds of layers are created at once, and setting attributes on a module is slow
        tables: dict[str, Any] = {
            name: {} for name in ("r", "lora_alpha", "scaling", "variant", "settings", "trains", "memory")
        }
        self.__dict__.update(tables, training=base_layer.training, state=state, kind_name=kind.name, spec=spec)
        self.__dict__.update(merged_adapters=[], tied_weight=None, forwards=Forwards())
        state.join(self)

    def _get_name(self) -> str:
        merged = f"[merged: {', '.join(self.merged_adapters)}]" if self.merged_adapters else ""
        return f"lora.{type(self).__name__}{merged}"  # for `repr`, which also shows the base's type

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            holder = _new_holder(name)
            if holder is not None:
                self._modules[name] = holder
                return holder
            methods = self.state.peft_methods if "state" in self.__dict__ else None
            if methods is not None and name in methods.names:
                return methods.answer(self, name)
            return getattr(super().__getattr__("base_layer"), name)

    def available_adapters(self) -> list[str]:
        """Return the adapters that have factors in this layer."""
        return list(self.r)

    def set_trained(self, name: str, trained: bool) -> None:
        """Unfreeze or freeze an adapter's tensors, except for those that its init or variant keeps frozen."""
        super().set_trained(name, trained)
        if not trained or name not in self.r:
            return
        for own in variant_named(self.variant[name]).parts.extras:
            if not own.trained:
                self._own(name, own).requires_grad_(False)
        if len(self.trains[name]) < 2:
            for part in {"A", "B"} - self.trains[name]:
                if (tensor := getattr(self.factor(name), part)).is_leaf:  # another layer owns and freezes a non-leaf
                    tensor.requires_grad_(False)

    def put(self, name: str, factor: Factor, r: int, lora_alpha: float, trains: frozenset[str]) -> None:
        """Add an adapter's A (r, in), B (out, r) and extra tensors, which become parameters, except for buffers.

        `trains` is which of "A" and "B" are trained.
        """
        kind = self.kind
        A, B = parameter(factor.A), parameter(factor.B)
        down, up = (getattr(self, attribute) for attribute in kind.names)
        self.memory.clear()  # may depend on the site's other adapters
        down[name], up[name] = _weight_holders(factor, A, B) if kind.on_disk else (A, B)
        self.lora_dropout[name] = factor.dropout
        for own in factor.variant.parts.extras:
            put_own(getattr(self, own.container), name, own.member, own.carried, factor.own[own.held_as])
        for container in map(self._modules.get, (*HOLDERS, *{own.container for own in factor.variant.parts.extras})):
            for new in () if container is None else (container, container._modules.get(name)):
                if new is not None and new.training is not self.training:  # new modules get the layer's mode
                    new.train(self.training)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name], self.variant[name], self.trains[name] = factor.scale, factor.variant.name, trains
        if factor.setting:
            self.settings[name] = factor.setting

    def remove(self, adapter: str) -> nn.Module:
        """Remove an adapter's factors, if any; return this layer, or the base module if no adapters are left."""
        for attribute in (*HOLDERS, *(own.container for own in own_tensors())):
            holder = self._modules.get(attribute)
            if isinstance(holder, (ModuleDict, ParameterDict, BufferDict)) and adapter in holder:
                del holder[adapter]
        for table in (self.r, self.lora_alpha, self.scaling, self.variant, self.settings, self.trains):
            table.pop(adapter, None)
        self.memory.clear()
        self.drop_override(adapter)
        return self if self.r else self.base_layer

    def bias_of(self, adapter: str) -> Tensor | None:
        """Return the bias of an adapter's B, (out,), or None if B has no bias."""
        kind = self.kind
        return self._holder(kind.names[1])[adapter].bias if kind.on_disk and adapter in self.r else None

    def factor(self, name: str) -> Factor:
        """Return an adapter's factors, A (r, in) and B (out, r); all reads of A and B go through this method."""
        kind = self.kind
        first, second = (self._holder(attribute)[name] for attribute in kind.names)
        A, B, bias = (first, second, None)
        if kind.on_disk:
            A, _ = _held(first)
            B, bias = _held(second)
        variant, own, setting = variant_named(self.variant[name]), NO_TENSORS, NO_SETTING
        if variant.is_lora:
            return Factor(A, B, self.scaling[name], self.lora_dropout[name], variant, own, bias, setting)
        own = {tensor.held_as: self._own(name, tensor) for tensor in variant.parts.extras}
        setting, memory = self.settings.get(name, NO_SETTING), self.memory.setdefault(name, {})
        return Factor(A, B, self.scaling[name], self.lora_dropout[name], variant, own, bias, setting, memory)

    def _own(self, name: str, own: OwnTensor) -> Tensor:
        """Return one of the extra tensors of an adapter's variant, in its in-memory shape (…)."""
        entry: Tensor | nn.Module = self._holder(own.container)[name]
        if isinstance(entry, Tensor):
            return entry
        tensor: Tensor = getattr(entry, own.member) if own.member else _held(entry)[0]
        return tensor

    def _holder(self, attribute: str) -> Mapping[str, Any]:
        """Return a container's entries, keyed by adapter, bypassing torch's slow attribute access."""
        holder: Any = self._modules[attribute]
        return holder._modules if isinstance(holder, ModuleDict) else holder

    def saved_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the tensors to save for an adapter, keyed by their names relative to this layer's path."""
        if adapter not in self.r:
            return {}
        factor, kind = self.factor(adapter), self.kind
        first, second = kind.names
        tensors = {f"{first}{kind.on_disk}": factor.A, f"{second}{kind.on_disk}": factor.B}
        if factor.bias is not None:
            tensors[f"{second}.bias"] = factor.bias
        for own in factor.variant.parts.extras:
            shape = own.shape(kind, self.spec, self.r[adapter], factor.setting)
            tensors[own.held_as] = factor.own[own.held_as].view(shape)
        return tensors

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return a list of an adapter's parameters in this layer, A and B first; empty if the adapter has none."""
        if adapter not in self.r:
            return []
        own, parameters = variant_named(self.variant[adapter]).parts.extras, []
        for holder in map(
            self._modules.get, (*TRAINED, *{tensor.container: None for tensor in own}) if own else TRAINED
        ):
            if isinstance(holder, ModuleDict):
                entry = holder._modules.get(adapter)
                if entry is not None:
                    for tensor in entry._parameters.values():  # empty if another layer holds a tied A or B
                        if tensor is not None:
                            parameters.append(tensor)
            elif isinstance(holder, ParameterDict) and adapter in holder:
                parameters.append(holder[adapter])
        return parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base output plus the additions of the active adapters, (…, out), in the dtype of the base output.

        The first argument is x (…, in), or indices (…) for an embedding.

        Raises:
            RouteError: The active route cannot be determined, or does not match this batch.
            MergeError: The route leaves out a merged adapter, but the base values were not kept.
        """
        route, again = resolve(self.state, self.own_route, self.forwards)
        if not self.merged_adapters and not self.moved_by and route.mentions.isdisjoint(self.r):
            y = self.base_layer(*args, **kwargs)
        else:
            y = self.adapted(route, args, kwargs)
        self.forwards.note(y, route, again)
        return y

    def adapted(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the base output y₀ (…, out) plus the additions of a route's adapters, for x (…, in)."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        stays = route.common_to_all(inside := self.inside())
        skip = frozenset(self.merged_adapters) if stays else frozenset()
        y0: Tensor = self.base_layer(*args, **kwargs) if stays else self._base_of_rows(route, x, args, kwargs)
        if route.kept is not None and not inside and (y := add_kept(self, route, x, y0)) is not None:
            return y
        if route.rows is not None:
            return self._mixed(route, skip, x, y0)
        weights: Weights = {}  # not `Weights()`, which dynamo cannot trace
        y, moved = y0, bool(self.moved_by) and not set(self.moved_by).isdisjoint(route.names)
        for name in [name for name in route.names if name in self.r and name not in skip]:
            own = name in self.moved_by
            needs_base = variant_named(self.variant[name]).output is not None and (bool(skip) or (moved and not own))
            its_base = bare(self._base_for(own))(*args, **kwargs) if needs_base else y0
            y = y + self._addition(name, route, x, its_base, weights)
        return y

    def _mixed(self, route: Route, skip: frozenset[str], x: Tensor, y0: Tensor) -> Tensor:
        """Apply each row's adapter to that row; x is (rows, …) and y0 is (rows, …, out).   [docs/math.md (13)]"""
        axis, weights = self._row_axis(route, x), Weights()
        here = [s for s in route.segments(x.device, x.shape[axis]) if s[0] in self.r and s[0] not in skip]
        y, left = add_stacked(self, here, route, x, y0)
        for name, index in left:
            own = (x.index_select(axis, index), y0.index_select(axis, index))
            y = y.index_add(axis, index, self._addition(name, route.alone(name, index), *own, weights))
        return y

    def _row_axis(self, route: Route, x: Tensor) -> int:
        """Return the axis of x (rows, …) that holds the rows, after checking that their number matches the route."""
        axis = self.kind.row_axis(self.owner)
        if axis is None or route.rows_of(x.shape[axis]) is None:
            size = "no batch axis" if axis is None else f"rows: {x.shape[axis]}"
            place = f"the input of a layer of kind {self.kind_name}"
            raise route.mismatch(place, f"{tuple(x.shape)}, {size}", self.kind_name, None)
        return axis

    def _addition(self, name: str, route: Route, x: Tensor, y0: Tensor, weights: Weights) -> Tensor:
        """Return what an adapter adds to y0 (…, out), for x (…, in) or indices (…).   [docs/math.md (2)]"""
        kind, factor, dtype = self.kind, self.factor(name), y0.dtype
        variant = factor.variant
        if kind.drops:
            x = factor.dropout(x.to(dtype))
        z = called_product(self, name, x, dtype)
        if z is None:
            A, B = (factor.A, factor.B) if variant.factors is None else variant.factors(factor, self.training)
            module = self.source if self.replaced else self.base_layer
            h = (
                kind.down(module, x, A.to(dtype))
                if variant.down is None
                else variant.down(kind, module, x, factor, self.training)
            )
            z = kind.up(module, h * factor.scale, B.to(dtype))  # scale h (…, r), because it is the smallest tensor
            if factor.bias is not None:
                z = z + spread(factor.bias.to(dtype) * factor.scale, self.spec)
        if variant.output is None:
            return z
        bias, mask = self._bias_under(route.names), route.acting(name)

        def read() -> Tensor:
            own = self.moved_by[0] if name in self.moved_by else None
            if own not in weights:
                weights[own] = self.read(own)
            return weights[own]

        def siblings() -> dict[str, Factor]:
            return {other: self.factor(other) for other in self.r if other != name}

        return variant.output(At(y0, bias, z, factor, kind, self.spec, read, mask, x, siblings))

    def _bias_under(self, names: tuple[str, ...]) -> Tensor | None:
        """Return the bias, (out,), that the base output includes while the given adapters are active, or None."""
        bias = self.original_bias()
        if bias is not None and self.old_bias is not None and self.old_bias[0] not in names:
            return self.old_bias[1].to(bias.device, bias.dtype)
        return bias

    def _base_of_rows(self, route: Route, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Compute the base output (rows, …, out) when the current base module is not the right one for every row."""
        moved = route.mentions.intersection(self.moved_by)
        if not moved or route.rows is None:
            return self._base_for(bool(moved))(*args, **kwargs)
        axis = self._row_axis(route, x)
        index = torch.cat([rows for name, rows in route.segments(x.device, x.shape[axis]) if name in moved])

        def forward(*inputs: Tensor, **named: Tensor) -> Tensor:  # both modules run on all rows, as their hooks expect
            before, moved = (bare(self._base_for(one))(*inputs, **named) for one in (False, True))
            return before.index_copy(axis, index, moved.index_select(axis, index))

        y: Tensor = with_forward(self.base_layer, forward)(*args, **kwargs)
        return y

    def addition(self, name: str, W: Tensor, training: bool = False) -> Tensor:
        """Return what merging an adapter adds to W (out, in) from `read`, in its shape.   [docs/math.md (11)]

        An adapter with a residual base uses that base instead of W. The result has an autograd graph if gradients are
        enabled. `training` is whether the variant may perturb A and B.

        Raises:
            MergeError: The variant cannot be merged, or the weight cannot hold the delta.
        """
        factor = self.factor(name)
        update = factor.variant.update
        if isinstance(update, str):
            raise MergeError(f"{factor.variant.title} cannot be added to a weight: {update}.", what=name)
        seen = self.read(name) if name in self.moved_by else W
        A, B = factor.multiplied(training)
        delta = self.kind.delta(self.spec, A.to(W.dtype), B.to(W.dtype)) * factor.scale
        return update(self.kind, self.spec, seen, delta, factor)

    @property
    def in_features(self) -> int:
        """The number of columns of the base weight: input features, input channels, or the vocabulary size."""
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        """The number of rows of the base weight, which equals the width of the output."""
        return self.spec.out_features

    @property
    def fan_in_fan_out(self) -> bool:
        """True if the base stores its weight as (in, out)."""
        return self.base.transposed

    @property
    def merged(self) -> bool:
        """True if an adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def get_base_layer(self) -> nn.Module:
        """Return the innermost base module."""
        return self.owner

    def get_base_weight(self) -> Tensor:
        """Return the current base weight in its stored shape; a quantized weight is dequantized to (out, in)."""
        base, owner = self.base, self.owner
        stored = base.stored(owner, self.spec.parameter)
        return base.read(owner, stored) if base.quantized else stored

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale, if it has factors here, to a multiple of the scale in its config."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._own_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer` with the same factor or, without one, reset the scales to those of the configs."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._own_scale(name) if scale is None else self.scaling[name] / scale

    def _own_scale(self, adapter: str) -> float:
        config = self.state.configs.get(adapter)
        return scale(self.r[adapter], self.lora_alpha[adapter], config is not None and config.use_rslora)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s·B·A of an adapter, with an autograd graph, as the weight is stored: (out, in) or (in, out)."""
        factor = self.factor(adapter)
        delta = self.kind.delta(self.spec, *factor.multiplied()) * factor.scale
        return delta.transpose(0, 1) if self.base.transposed else delta

    @trainable_tensors
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merge adapters, by default the active ones, into the weight of this layer alone; the original weight is kept.

        `safe_merge` is ignored, and present for PEFT compatibility: a non-finite result always raises an error.

        Raises:
            ConfigTypeError: `adapter_names` is a string.
            MergeError: An adapter cannot be merged.
            AdapterError: One of the adapters is not on the model.
        """
        active, here = self.active_adapters, self._to_merge(adapter_names)
        options = MergeOptions()
        layers = self._around_module("") if here else {}
        for path, layer in layers.items():
            layer.check_merge(path, here, options)
        led = {layer: leader for layer in layers.values() if (leader := layer.leader_of(here)) is not None}
        staged = [layer.stage_merge(path, here, options) for path, layer in layers.items() if layer not in led]
        for one in filter(None, staged):
            one.commit()
        for layer, leader in led.items():
            layer.follow(leader)
        if set(here) - set(active):  # activate newly merged adapters in this layer only
            self.own_route = Route((*active, *(name for name in here if name not in active)))

    def _to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Return the adapters to merge: those with factors in this layer that are not merged yet."""
        new = not_yet_merged(self.active_adapters if adapter_names is None else adapter_names, self.merged_adapters)
        self.state.check(new, AdapterError)
        return [name for name in new if name in self.r]

    @trainable_tensors
    def unmerge(self) -> None:
        """Unmerge all adapters and restore this layer's weight bit for bit; raise a MergeError if it was not kept."""
        if not self.merged_adapters:
            warn_caller("Already unmerged. Nothing to do.")
            return
        layers = self._around_module("")
        for path, layer in layers.items():
            layer.check_unmerge(path, layer.merged_adapters)
        led = {layer for layer in layers.values() if layer.leader_of(layer.merged_adapters) is not None}
        staged = [layer.stage_unmerge(list(layer.merged_adapters)) for layer in layers.values() if layer not in led]
        for one in filter(None, staged):
            one.commit()
        for layer in led:  # the tied layer, if it is still merged, restores the shared weight
            layer.merged_adapters, layer.kept = [], layer.kept if layer.moved_by else None

    def leader_of(self, adapters: Sequence[str]) -> LoraLayer | None:
        """Return the tied layer whose weight and (transposed) factors this layer uses for these adapters, or None."""
        here = [name for name in adapters if name in self.r]
        factors = getattr(self, self.kind.names[0])
        leading = {leader for name in here for leader in getattr(factors[name], "leader", (None,))}
        leader = next(iter(leading)) if len(leading) == 1 else None
        return leader if leader is not None and self.is_one_with(leader, adapters) else None

    def is_one_with(self, tied: LoraLayer, adapters: Collection[str]) -> bool:
        """Return whether another layer shares this layer's weight and has factors for the same of these adapters."""
        if any((name in self.r) != (name in tied.r) for name in adapters):
            return False
        mine, its = (one.source._parameters.get(one.spec.parameter) for one in (self, tied))
        return mine is its and mine is not None

    def _around_module(self, path: str) -> dict[str, LoraLayer]:
        """Return this layer, the layers it wraps, and those that wrap `inner` child modules, keyed by path."""
        layers: dict[str, LoraLayer] = {}
        layer: nn.Module = self
        while isinstance(layer, LoraLayer):
            layers[path] = layer
            layer, path = layer.base_layer, f"{path}.base_layer" if path else "base_layer"
        for child in self.kind.inner:
            inside = layer._modules[child]
            if isinstance(inside, LoraLayer):
                layers |= inside._around_module(f"{path}.{child}")
        return layers


def not_yet_merged(names: Sequence[str], merged: Sequence[str], quiet: bool = False) -> list[str]:
    """Return the adapters that are not merged yet, and warn about the others as PEFT does, unless `quiet`.

    A ConfigTypeError is raised if `names` is a string.
    """
    if isinstance(names, str):
        text = f"adapter_names should be a list of strings, got {names!r}."
        raise ConfigTypeError(text, what=names, field="adapter_names")
    new = [name for name in names if name not in merged]
    if merged and not quiet:
        warn_caller(
            f"Already following adapters were merged {','.join(merged)}. You are now additionally merging "
            f"{','.join(new)}."
            if new
            else "All adapters are already merged, nothing to do."
        )
    return new
