"""A walk over a model that leaves out what carries factors: most modules of an adapted model are such carriers.

The map of a model: which modules can take factors, who holds them, and which share one weight.

One walk gives the candidates for target matching, every parent of each module (a module can stand in several
places), and the adapted layers. It knows nothing about configs or arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lorakit.core.clones import PARAMETRISED
from lorakit.core.kinds import INNER, KINDS, PARAMETER, Kind, Slot, checked, kind_named, kind_of
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.quantization import base_of, is_computed
from lorakit.core.routing.state import AdapterState
from lorakit.errors import AdapterError
from lorakit.targets import Candidate


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, as `named_modules` in name and order, without the carriers of factors.

    Args:
        model: Any module.

    Yields:
        Path, and the module.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if not module._modules:
            continue
        prefix = f"{path}." if path else ""
        if isinstance(module, LoraLayer):
            waiting.append((f"{prefix}base_layer", module.base_layer))
        else:
            inside = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            waiting.extend(reversed(inside))


@dataclass(frozen=True)
class Site:
    """A place where adapters sit.

    Attributes:
        path: Dotted path in the model.
        kind: Name of the kind.
        out_features: Rows of the canonical weight.
        in_features: Columns of the canonical weight.
        layer: The layer that stands there.
    """

    path: str
    kind: str
    out_features: int
    in_features: int
    layer: LoraLayer


@dataclass(frozen=True)
class Place:
    """Where one factor sits, before or after its layer is there.

    Attributes:
        path: Path of its layer, also its name on disk.
        outer: Path of the module in the plain base.
        kind: The kind of the site.
        slot: The weight.
        child: Name of the child of that module that holds the weight, "" for the module itself.
    """

    path: str
    outer: str
    kind: Kind
    slot: Slot
    child: str = ""

    @property
    def pattern_path(self) -> str:
        """What `rank_pattern` and `alpha_pattern` are held against: the path of its module or bare parameter."""
        return f"{self.outer}.{self.slot.parameter}" if self.kind.name == PARAMETER.name else self.outer


@dataclass(frozen=True)
class SiteMap:
    """A model as attaching sees it.

    Attributes:
        modules: Path -> module, of the base and of the layers that stand in it, in order.
        parents: id of a module -> every (parent, attribute) that holds it.
        candidates: What targets may name.
        own: Kinds that the user made, by name.
        tied: Modules that share a weight are one, unless the model's config says that its embeddings are not.
    """

    modules: dict[str, nn.Module]
    parents: dict[int, list[tuple[nn.Module, str]]]
    candidates: list[Candidate]
    own: dict[str, Kind] = field(default_factory=dict)
    tied: bool = True

    def kind(self, name: str) -> Kind:
        """The kind with that name, of the table or the user's."""
        return kind_named(name, self.own)

    def base(self, path: str) -> nn.Module:
        """The base's module at a path, also where a layer or trained rows stand there."""
        standing = self.modules[path]
        if isinstance(standing, TrainableTokens):
            return standing.original_module
        return standing.owner if isinstance(standing, LoraLayer) else standing

    def places(self, path: str, kind: Kind) -> list[Place]:
        """Every weight that naming a module adapts.

        Args:
            path: Path of the module.
            kind: Its kind.

        Returns:
            The places, in the order in which their layers can be put around the module: the innermost first.
        """
        owner = self.base(path)
        slots = kind.slots(owner)
        found = [Place(path + INSIDE * depth, path, kind, slot) for depth, slot in enumerate(slots)]
        for child in kind.inner:
            (slot,) = INNER.slots(inner_base(owner, child))
            found.append(Place(f"{path}{INSIDE * len(slots)}.{child}", path, INNER, slot, child))
        return found[::-1]

    def holder(self, place: Place) -> nn.Module:
        """The base's module that holds a place's weight."""
        owner = self.base(place.outer)
        return inner_base(owner, place.child) if place.child else owner

    @cached_property
    def shared(self) -> dict[int, list[str]]:
        """Id of each parameter that several modules of the base hold -> their paths."""
        held: dict[int, list[str]] = {}
        for path in self.modules:
            for parameter in self.base(path)._parameters.values():
                if parameter is not None:
                    held.setdefault(id(parameter), []).append(path)
        return {key: paths for key, paths in held.items() if len(paths) > 1}

    def weight(self, place: Place) -> Tensor:
        """The base weight at a place without anything merged, canonical (out, in), fp32 or wider."""
        standing, module, parameter = self.layer(place), self.holder(place), place.slot.parameter
        if standing is not None:
            return standing.read()
        base = base_of(module, parameter, place.slot.as_stored)
        return base.read(module, base.stored(module, parameter))

    def layer(self, place: Place) -> LoraLayer | None:
        """The layer that stands at a place already, or None."""
        if place.child:
            inside = self.base(place.outer)._modules[place.child]
            return inside if isinstance(inside, LoraLayer) else None
        standing = self.modules[place.outer]
        while isinstance(standing, LoraLayer) and standing.slot.parameter != place.slot.parameter:
            standing = standing.base_layer
        return standing if isinstance(standing, LoraLayer) else None

    def put(self, place: Place, make: Callable[[nn.Module], LoraLayer]) -> LoraLayer:
        """Stand a new layer at a place; those of one module's bare parameters keep the order of their definition.

        Args:
            place: Where.
            make: Makes the layer around the module that it gets.
        """
        if place.child:
            owner = self.base(place.outer)
            layer = make(owner._modules[place.child])  # type: ignore[arg-type]
            owner._modules[place.child] = layer
            return layer
        standing = inside = self.modules[place.outer]
        around: LoraLayer | None = None
        while isinstance(inside, LoraLayer) and _goes_around(inside, place):
            around, inside = inside, inside.base_layer
        layer = make(inside)
        if around is not None:
            around.base_layer = layer
            return layer
        self.replace(standing, layer)
        self.modules[place.outer] = layer
        return layer

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module where another stands, in every place."""
        for parent, attribute in self.parents[id(old)]:
            parent._modules[attribute] = new
        self.parents[id(new)] = self.parents[id(old)]


INSIDE = ".base_layer"
"""What the path of a layer gets for each layer that stands around it."""

DENSE_KINDS = frozenset({"Linear", "Conv1D"})
"""The kinds that "all-linear" means."""


def defined_parameters(module: nn.Module) -> list[str]:
    """The names of a module's own parameters in the order of their definition, those that are parametrised last."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    parametrised = module._modules.get(PARAMETRISED)
    return names + ([] if parametrised is None else list(parametrised._modules))


def _goes_around(layer: LoraLayer, place: Place) -> bool:
    """Whether a layer has to stand around the one that comes: of bare parameters, the one that is defined last."""
    if place.kind.name != PARAMETER.name:
        return False
    names = defined_parameters(layer.owner)
    return names.index(layer.slot.parameter) > names.index(place.slot.parameter)


def inner_base(owner: nn.Module, child: str) -> nn.Module:
    """A child of a module of the base, also where a layer stands around it."""
    inside: nn.Module = owner._modules[child]  # type: ignore[assignment]
    return inside.owner if isinstance(inside, LoraLayer) else inside


def survey(model: nn.Module, kinds: Iterable[Kind] = ()) -> SiteMap:
    """Walk a model once.

    Args:
        model: Any module; adapters may sit in it already.
        kinds: Kinds that the user made, beside those that adapters on the model brought.

    Returns:
        The map. What stands inside an adapted layer or beside a copied module is not listed.

    Raises:
        ConfigError: One of `kinds` cannot be used.
    """
    state = find_state(model)
    own = {**({} if state is None else state.kinds), **checked(kinds)}
    head = _output_head(model)
    modules: dict[str, nn.Module] = {}
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    candidates: list[Candidate] = []
    known: dict[type[nn.Module], Kind | None] = {}
    for path, module in _outside_of_adapters(model, "", set(), parents):
        if path:
            modules[path] = module
            base = module.owner if isinstance(module, LoraLayer) else module
            if type(base) not in known:
                known[type(base)] = kind_of(type(base), own)
            candidates.append(_candidate(path, base, known[type(base)], head))
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", True) is not False
    return SiteMap(modules, parents, candidates, own, tied)


def sites(model: nn.Module) -> list[Site]:
    """The places of a model where adapters sit, in the model's order.

    Args:
        model: An adapted model; one without adapters has none.
    """
    return [
        Site(path, layer.kind_name, layer.slot.out_features, layer.slot.in_features, layer)
        for path, layer in layers(model)
    ]


def layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Every adapted layer with its path."""
    return [(path, module) for path, module in walk(model) if isinstance(module, LoraLayer)]


def copies(model: nn.Module) -> list[tuple[str, ModulesToSave]]:
    """Every module with trained copies, with its path."""
    return [(path, module) for path, module in walk(model) if isinstance(module, ModulesToSave)]


def state_of(model: nn.Module) -> AdapterState:
    """The state that the layers of a model share.

    Raises:
        AdapterError: The model has no adapters.
    """
    state = find_state(model)
    if state is None:
        raise AdapterError(f"This {type(model).__name__} has no adapters. Attach or load one first.")
    return state


def find_state(model: nn.Module) -> AdapterState | None:
    """The state that the layers of a model share, or None where there are no adapters.

    Raises:
        AdapterError: Parts of the model were adapted apart, so that no one state says what acts in it.
    """
    for path, module in walk(model):
        if isinstance(module, AdapterModule):
            if model not in module.state.whole:
                _check_whole(model, path, module.state)
            return module.state
    return None


def _check_whole(model: nn.Module, first: str, state: AdapterState) -> None:
    """Refuse a model with adapted parts of another state; what was looked through is not looked through again."""
    for path, module in walk(model):
        if isinstance(module, AdapterModule) and module.state is not state:
            raise AdapterError(
                f"{first or 'The model'} and {path} were adapted apart: by calls on parts of this "
                f"{type(model).__name__}, or one is a copy of a layer that had adapters. Nothing can be said of all at "
                "once. Call this on each part; or detach them, and attach or load adapters on the whole."
            )
    state.whole.add(model)


def _outside_of_adapters(
    module: nn.Module, path: str, seen: set[int], parents: dict[int, list[tuple[nn.Module, str]]]
) -> Iterator[tuple[str, nn.Module]]:
    seen.add(id(module))
    yield path, module
    if isinstance(module, AdapterModule):
        return
    for attribute, child in module._modules.items():
        if child is None:
            continue
        parents.setdefault(id(child), []).append((module, attribute))
        if id(child) not in seen:
            yield from _outside_of_adapters(child, f"{path}.{attribute}" if path else attribute, seen, parents)


def _candidate(path: str, base: nn.Module, kind: Kind | None, head: nn.Module | None) -> Candidate:
    if kind is None or not _can_be_read(base, kind):
        return Candidate(path, None, type(base).__name__)
    slot = kind.slots(base)[0]
    dense = (kind.name in DENSE_KINDS or (kind.layer is not None and isinstance(base, nn.Linear))) and base is not head
    return Candidate(path, kind.name, type(base).__name__, dense, slot.out_features, slot.in_features)


def _can_be_read(module: nn.Module, kind: Kind) -> bool:
    """Whether the weights of a module are floats, or stored in a way that BASES knows."""
    weight = module._parameters.get("weight")
    floats = weight is not None and torch.is_floating_point(weight) and weight.ndim > 1
    return floats or kind.acts_on == "weight" or kind not in KINDS or is_computed(module) or base_of(module).quantised


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        head = getter()
    except (AttributeError, NotImplementedError):  # models without one differ in how they say so
        return None
    return head if isinstance(head, nn.Module) else None
