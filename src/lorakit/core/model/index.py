"""Index a model in one pass: its modules, their parents and its adapted layers.

Each public call builds an index, passes it to other functions and discards it. No index is kept between calls, because
other code may tie, offload or copy modules at any time. In an adapted model, most modules only hold factors; traversals
skip those modules. This file does not handle configs or arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lorakit.core.clones import PARAMETRISED
from lorakit.core.kinds import INNER, KINDS, Kind, WeightSpec, checked, kind_named, kind_of
from lorakit.core.layers.adapter_component import AdapterComponent, AdapterModule, trainable
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.quantization import is_computed, weight_format_of
from lorakit.core.routing.state import AdapterState, Place
from lorakit.errors import AdapterError
from lorakit.targets.resolving import Candidate

INSIDE = ".base_layer"
"""Suffix that each enclosing layer adds to the path of the module that it wraps."""

REPLICATION = "_lorakit_replication"
"""Name of the attribute in which a replicated list of layers stores its `Replication`, with the original list."""

COMPILED = "_orig_mod"
WRAPPERS = frozenset({COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Names under which torch.compile, activation checkpointing and FSDP hold a module; paths do not contain them."""

Children = Sequence[tuple[str, nn.Module]]
Component = TypeVar("Component", bound=AdapterModule)


@dataclass(frozen=True)
class TargetWeight:
    """A weight that an adapter targets, whether or not the weight already has an adapted layer.

    Attributes:
        path: Path of the weight's adapted layer in the model and on disk.
        outer: Path of the targeted module in the plain base.
        spec: The weight's shape, parameter name and layout.
        child: Name of the child module that holds the weight, or "" if the module at `outer` holds it directly.
    """

    path: str
    outer: str
    kind: Kind
    spec: WeightSpec
    child: str = ""

    @property
    def pattern_path(self) -> str:
        """The path of the module or bare parameter, to match against `rank_pattern` and `alpha_pattern`."""
        return f"{self.outer}.{self.spec.parameter}" if self.kind.names_parameter else self.outer


@dataclass
class AdapterIndex:
    """A snapshot of a model during one public call; only `put` and `replace` update the snapshot.

    Attributes:
        state: The state that the adapted modules share, or None if there are no adapted modules.
        modules: Path -> module, for base modules and the components that replace them; the model itself and the modules
            inside an adapted module are left out.
        everything: Path -> module, in `named_modules` order, including modules inside adapted ones and the model
            itself (""), but excluding modules that only hold factors.
        parents: Id of a module -> all (parent, attribute) pairs that refer to the module; children of an adapted module
            are listed only if they are adapted modules themselves.
        components: Path -> adapted module, in model order.
        patches: Path -> hooks through which adapters train the biases of the module at that path.
        kinds: Name of a custom site kind -> kind.
        replaced: Places of adapted modules that other modules have replaced since the model was last indexed.
    """

    model: nn.Module
    state: AdapterState | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    everything: dict[str, nn.Module] = field(default_factory=dict)
    parents: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    components: dict[str, AdapterModule] = field(default_factory=dict)
    patches: dict[str, list[BiasPatch]] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    replaced: list[Place] = field(default_factory=list)
    _children: dict[int, Children] = field(default_factory=dict)
    _plain: dict[bool, list[tuple[str, nn.Module]]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module | AdapterIndex, kinds: Iterable[Kind] = ()) -> AdapterIndex:
        """Build the index of any module in one pass; an index is returned unchanged.

        Custom kinds are added to those that the model's adapters already use.

        Raises:
            AdapterError: Parts of the model were adapted separately and do not share a state.
            ConfigError: One of `kinds` is not valid.
        """
        if isinstance(model, AdapterIndex):
            return model
        index = cls(model)
        for written, module, children, is_new, is_outside in _visits(model):
            path = without_wrappers(written)
            if is_outside and path:
                index.modules[path] = module
            plain = is_outside and not isinstance(module, AdapterModule)
            for attribute, child in children:
                if plain or isinstance(child, AdapterModule):
                    index.parents.setdefault(id(child), []).append((module, attribute))
            if is_new:
                index._note(path, module, children)
        if index.state is not None:
            index.state.whole.add(model)
            index.note_places()
        index.kinds = {**({} if index.state is None else index.state.kinds), **checked(kinds)}
        return index

    def _note(self, path: str, module: nn.Module, children: Children) -> None:
        self.everything[path] = module
        self._children[id(module)] = children
        if isinstance(module, AdapterModule):
            if self.state is not None and self.state is not module.state:
                raise AdapterError(
                    f"{next(iter(self.components)) or 'The model'} and {path} were adapted separately and do not share "
                    f"a state: adapters were attached to parts of this {type(self.model).__name__}, or one of the two "
                    "is a copy of an adapted layer. Call this function on each part separately, or detach the adapters "
                    "and then attach or load them on the whole model.",
                    where=path,
                )
            self.state = module.state
            self.components[path] = module
        if module._forward_hooks:
            patches = BiasPatch.on(module)
            if patches:
                self.patches[path] = patches

    def note_places(self) -> None:
        """Store in the state where the adapted modules are, and find those that were replaced by hand."""
        state, visited = self.known_state(), {id(module) for module in self.everything.values()}
        present = {id(module.__dict__) for module in self.components.values()}
        places = []
        for path, module in self.components.items():
            for parent, attribute in self.parents.get(id(module), ())[:1]:
                adapters = tuple(module.available_adapters())
                places.append(Place(path, weakref.ref(parent), attribute, weakref.ref(module), adapters))
        self.replaced = []
        for place in state.places:
            holder, old = place.parent(), place.module()
            is_left = holder is None or state.configs.keys().isdisjoint(place.adapters)
            if is_left or (old is not None and id(old.__dict__) in present):
                continue
            places.append(place)
            if id(holder) in visited:
                self.replaced.append(place)
        state.places = places

    def check_complete(self, adapters: Collection[str]) -> None:
        """Raise an AdapterError if a module of these adapters was replaced by hand, so that a part is missing."""
        for place in self.replaced:
            name = next((name for name in place.adapters if name in adapters), None)
            if name is not None:
                text = f"{place.path}: another module replaced that of adapter {name!r}; put that back, or detach it."
                raise AdapterError(text, what=name, where=place.path)

    def is_compiled(self, path: str) -> bool:
        """Return whether torch.compile wraps the module at a path itself, so that a replacement would not be called."""
        module = self.modules[path]
        return any(attribute == COMPILED for _, attribute in self.parents.get(id(module), ()))

    def again(self) -> AdapterIndex:
        """Return a fresh index of the same model, for use after its modules have changed."""
        return AdapterIndex.of(self.model, self.kinds.values())

    def layers(self, adapter: str | None = None) -> Iterator[tuple[str, LoraLayer]]:
        """Yield (path, layer) for every adapted layer, or for every layer where the given adapter has factors."""
        for path, layer in self.components.items():
            if isinstance(layer, LoraLayer) and (adapter is None or adapter in layer.r):
                yield path, layer

    def layers_of(self, adapters: Collection[str]) -> Iterator[tuple[str, LoraLayer]]:
        """Yield (path, layer) for every layer where at least one of the given adapters has factors."""
        for path, layer in self.layers():
            if any(name in layer.r for name in adapters):
                yield path, layer

    def with_biases(self) -> Iterator[tuple[str, AdapterComponent]]:
        """Yield (path, component) for every adapted module in model order, and then for every trained bias."""
        yield from self.components.items()
        for path, patches in self.patches.items():
            yield from ((path, patch) for patch in patches)

    def bias_patches(self) -> Iterator[BiasPatch]:
        """Yield the hooks through which adapters train biases."""
        for patches in self.patches.values():
            yield from patches

    def every(self, kind: type[Component]) -> Iterator[tuple[str, Component]]:
        """Yield (path, component) for every component of the given class, such as `ModulesToSave`."""
        for path, component in self.components.items():
            if isinstance(component, kind):
                yield path, component

    def merged_adapters(self) -> list[str]:
        """Return the names of the adapters that are merged into at least one weight."""
        return sorted({name for component in self.components.values() for name in component.merged_adapters})

    def known_state(self) -> AdapterState:
        """Return the state that the adapted modules share; raise an AdapterError if the model has no adapters."""
        if self.state is None:
            name = type(self.model).__name__
            raise AdapterError(f"This {name} has no adapters. Attach or load one first.", what=name)
        return self.state

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All modules that target entries can refer to, in model order."""
        head = embedding_of(self.model, "output")
        known: dict[type[nn.Module], Kind | None] = {}
        candidates = []
        for path, module in self.modules.items():
            base = module.owner if isinstance(module, LoraLayer) else module
            if type(base) not in known:
                known[type(base)] = kind_of(type(base), self.kinds)
            candidates.append(_candidate(path, base, known[type(base)], head))
        return candidates

    @property
    def is_tied(self) -> bool:
        """False only if the config sets `tie_word_embeddings=False`; shared weights are then not treated as tied."""
        return getattr(getattr(self.model, "config", None), "tie_word_embeddings", True) is not False

    @cached_property
    def holders(self) -> dict[int, list[tuple[str, nn.Module]]]:
        """Dict from each base weight's `identity` to (weight name, module) pairs for all modules that hold it."""
        holders: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, module in self.plain_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    holders.setdefault(identity(parameter), []).append((prefix + name, module))
        return holders

    def names_elsewhere(self, parameter: Tensor | None, modules: Collection[int]) -> list[str]:
        """Return the names of a base weight, of any shape, in all modules except for those with the given ids."""
        return [name for name, module in self.holders.get(identity(parameter), ()) if id(module) not in modules]

    def plain_modules(self, stacked: bool = True) -> list[tuple[str, nn.Module]]:
        """Return the base's modules with their paths in the plain base; a module with two paths is listed twice.

        With `stacked`, replicated layers (`layer_replication`) are listed, otherwise the original ones.
        """
        if stacked not in self._plain:
            self._plain[stacked] = self._plain_modules(stacked)
        return self._plain[stacked]

    def _plain_modules(self, stacked: bool) -> list[tuple[str, nn.Module]]:
        modules: list[tuple[str, nn.Module]] = []
        waiting = [("", self.model)]
        while waiting:
            path, module = waiting.pop()
            if not stacked and REPLICATION in module.__dict__:
                module = module.__dict__[REPLICATION].original
            if isinstance(module, LoraLayer):
                module = module.source
            elif isinstance(module, (ModulesToSave, TrainableTokens)):
                module = module.original_module
            modules.append((path, module))
            prefix = f"{path}." if path else ""
            children = self._children.get(id(module)) or _children_of(module)
            waiting.extend((without_wrappers(prefix + name), child) for name, child in reversed(children))
        return modules

    def kind(self, name: str) -> Kind:
        """Return the registered or custom site kind with the given name."""
        return kind_named(name, self.kinds)

    def base(self, path: str) -> nn.Module:
        """Return the base module at a path, even if an adapted layer or a `TrainableTokens` has replaced it."""
        module = self.modules[path]
        if isinstance(module, TrainableTokens):
            return module.original_module
        return module.owner if isinstance(module, LoraLayer) else module

    def targets(self, path: str, kind: Kind) -> list[TargetWeight]:
        """Return the weights to adapt when a target entry names a module, with the innermost layer's first."""
        owner = self.base(path)
        specs = kind.specs(owner)
        targets = [TargetWeight(path + INSIDE * depth, path, kind, spec) for depth, spec in enumerate(specs)]
        for child in kind.inner:
            (spec,) = INNER.specs(inner_base(owner, child))
            targets.append(TargetWeight(f"{path}{INSIDE * len(specs)}.{child}", path, INNER, spec, child))
        return targets[::-1]

    def holder(self, target: TargetWeight) -> nn.Module:
        """Return the base module that holds a target weight."""
        owner = self.base(target.outer)
        return inner_base(owner, target.child) if target.child else owner

    def weight(self, target: TargetWeight) -> Tensor:
        """Return a base weight as it was before any merge, in canonical form (out, in) and in fp32 or wider."""
        layer, module, parameter = self.layer(target), self.holder(target), target.spec.parameter
        if layer is not None:
            return layer.read()
        base = weight_format_of(module, parameter, target.spec.as_stored)
        return base.read(module, base.stored(module, parameter))

    def layer(self, target: TargetWeight) -> LoraLayer | None:
        """Return the adapted layer for a target weight, or None if the weight has no layer yet."""
        if target.child:
            inside = self.base(target.outer)._modules[target.child]
            return inside if isinstance(inside, LoraLayer) else None
        module = self.modules[target.outer]
        while isinstance(module, LoraLayer) and module.spec.parameter != target.spec.parameter:
            module = module.base_layer
        return module if isinstance(module, LoraLayer) else None

    def put(self, target: TargetWeight, make: Callable[[nn.Module], LoraLayer]) -> LoraLayer:
        """Wrap a target weight in a new layer, and return it; layers for parameters are nested in definition order."""
        if target.child:
            owner = self.base(target.outer)
            layer = make(owner.get_submodule(target.child))
            owner._modules[target.child] = self.components[target.path] = layer
            self.parents[id(layer)] = [(owner, target.child)]
            return layer
        outermost = inside = self.modules[target.outer]
        around: LoraLayer | None = None
        while isinstance(inside, LoraLayer) and _goes_around(inside, target):
            around, inside = inside, inside.base_layer
        layer = make(inside)
        if around is not None:
            around.base_layer = layer
            self.parents[id(layer)] = [(around, "base_layer")]
        else:
            self.replace(outermost, layer)
            self.modules[target.outer] = layer
        path, here = target.outer, self.modules[target.outer]
        while isinstance(here, LoraLayer):
            self.components[path] = here
            path, here = path + INSIDE, here.base_layer
        return layer

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Replace a module, which is adapted or not inside an adapted one, with another module in every parent."""
        targets = self.parents.get(id(old), [])
        for parent, attribute in targets:
            parent._modules[attribute] = new
        self.parents[id(new)] = targets


def _visits(model: nn.Module) -> Iterator[tuple[str, nn.Module, Children, bool, bool]]:
    """Walk through a model's modules; all other traversals use this function.

    Yields:
        The path, the module, its children (without those that only hold factors), whether this is the first visit to
        the module, and whether it is the first visit outside adapted modules.
    """
    seen: set[int] = set()
    outside: set[int] = set()
    waiting: list[tuple[str, nn.Module, bool]] = [("", model, True)]
    while waiting:
        path, module, is_outside = waiting.pop()
        key = id(module)
        is_new, is_outside = key not in seen, is_outside and key not in outside
        if not (is_new or is_outside):
            continue
        seen.add(key)
        if is_outside:
            outside.add(key)
        children = _children_of(module) if module._modules else ()
        yield path, module, children, is_new, is_outside
        if children:
            prefix, inside = f"{path}." if path else "", is_outside and not isinstance(module, AdapterModule)
            for name, child in reversed(children):
                waiting.append((prefix + name, child, inside))


def _children_of(module: nn.Module) -> Children:
    children = module._modules
    if isinstance(module, LoraLayer):
        children = {"base_layer": children["base_layer"]}
    return [(name, child) for name, child in children.items() if child is not None]


def without_wrappers(path: str) -> str:
    """Return a path without the names in `WRAPPERS`, which is the path in the model before its modules were wrapped."""
    if COMPILED not in path and "_wrapped_module" not in path:  # fast, because every path of a model is tested
        return path
    return ".".join(word for word in path.split(".") if word not in WRAPPERS)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every (path, module) pair once, as `named_modules` does, but skip modules that only hold factors."""
    for path, module, _, is_new, _ in _visits(model):
        if is_new:
            yield path, module


def find_state(model: nn.Module) -> AdapterState | None:
    """Return the adapter state that a model's layers share, or None if the model has no adapters.

    The search stops at the first adapted module, unless the model has never been indexed.

    Raises:
        AdapterError: Parts of the model were adapted separately and do not share a state.
    """
    for _, module in walk(model):
        if isinstance(module, AdapterModule):
            if torch.compiler.is_compiling():  # weak sets cannot be traced
                return module.state
            is_known = model in module.state.whole and module.state.in_place()
            return module.state if is_known else AdapterIndex.of(model).state
    return None


def state_of(model: nn.Module) -> AdapterState:
    """Return the state that a model's adapters share; raise an AdapterError if there are none."""
    state = find_state(model)
    return AdapterIndex(model).known_state() if state is None else state  # indexing is slow, and `use` is called often


def identity(parameter: Tensor | None) -> int:
    """Return the same key for all parameters (of any shape) that share memory: the address or, without one, the id."""
    if parameter is None or type(parameter.data) is not Tensor:
        return id(parameter)
    return parameter.data_ptr() or id(parameter)


def defined_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's direct parameters in definition order, with parametrized parameters last."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    parametrised = module._modules.get(PARAMETRISED)
    return names + ([] if parametrised is None else list(parametrised._modules))


def inner_base(owner: nn.Module, child: str) -> nn.Module:
    """Return the original child of a base module, even if an adapted layer has replaced the child."""
    inside = owner.get_submodule(child)
    return inside.owner if isinstance(inside, LoraLayer) else inside


def _goes_around(layer: LoraLayer, target: TargetWeight) -> bool:
    """Return whether a layer must enclose a new layer; the parameter defined last has the outermost layer."""
    if not target.kind.names_parameter:
        return False
    names = defined_parameters(layer.owner)
    return names.index(layer.spec.parameter) > names.index(target.spec.parameter)


def _candidate(path: str, base: nn.Module, kind: Kind | None, head: nn.Module | None) -> Candidate:
    if kind is None or not _can_be_read(base, kind):
        return Candidate(path, None, type(base).__name__)
    spec = kind.specs(base)[0]
    dense = (
        kind.is_dense or kind.read_by_owner or (kind.layer is not None and isinstance(base, nn.Linear))
    ) and base is not head
    return Candidate(path, kind.name, type(base).__name__, dense, spec.out_features, spec.in_features)


def _can_be_read(module: nn.Module, kind: Kind) -> bool:
    """Return whether a module's weights can be read: as floats, via `WEIGHT_FORMATS`, or through a custom kind."""
    weight = module._parameters.get("weight")
    if weight is not None and torch.is_floating_point(weight) and weight.ndim > 1:
        return True
    is_custom = kind.acts_on == "weight" or kind not in KINDS
    return is_custom or is_computed(module) or weight_format_of(module).quantized


def embedding_of(model: nn.Module, which: Literal["input", "output"] = "input") -> nn.Module | None:
    """Return a model's input embedding or output head, or None if the model does not expose one."""
    getter = getattr(model, f"get_{which}_embeddings", None)
    try:
        embedding = None if getter is None else getter()
    except (AttributeError, NotImplementedError):  # which error is raised depends on the model's class
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Return a (path, layer) pair for every adapted layer."""
    return [(path, module) for path, module in walk(model) if isinstance(module, LoraLayer)]


def trainable_block(index: AdapterIndex) -> AbstractContextManager[object]:
    """Return a context manager in which new tensors are trainable in `torch.inference_mode`; see `trainable`."""
    parameters = (p for module in index.everything.values() for p in module._parameters.values() if p is not None)
    return trainable(index.model, next(parameters, None))
