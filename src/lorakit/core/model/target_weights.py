"""Sites of a model, and the weights that an adapter adapts: targets and bare parameters, and their paths on disk.

A module with several adapted parameters has one layer for each, the one of the parameter that is defined last
outermost; PEFT writes them to disk in that order, without the parameters' names. An adapter's own parameters
alone count there, whatever other adapters stand around the same module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.kinds import PARAMETER, parameter_slot
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.weight_layer import shows_tokens
from lorakit.core.model.index import INSIDE, AdapterIndex, TargetWeight, defined_parameters
from lorakit.errors import ConfigError, TargetError
from lorakit.targets import BareParameter, Match, targeted_parameters


@dataclass(frozen=True)
class Site:
    """A weight of a model at which adapters have factors.

    Attributes:
        path: Dotted path in the model.
        kind: Name of the kind.
        out_features: Rows of the canonical weight.
        in_features: Columns of the canonical weight.
        layer: The layer that is there.
    """

    path: str
    kind: str
    out_features: int
    in_features: int
    layer: LoraLayer


def sites(model: nn.Module) -> list[Site]:
    """Return the adapted sites in model order.

    Args:
        model: An adapted model; one without adapters has none.
    """
    return [
        Site(path, layer.kind_name, layer.slot.out_features, layer.slot.in_features, layer)
        for path, layer in AdapterIndex.of(model).layers()
    ]


def bare_parameters(index: AdapterIndex) -> list[BareParameter]:
    """Return every parameter of the base that `target_parameters` may name, in the order of definition.

    Args:
        index: The model's index; the model's own parameters are named too so that they can be refused.
    """
    owners = [("", index.model), *((path, index.base(path)) for path in index.modules)]
    return [
        BareParameter(path, name, tuple(getattr(owner, name).shape))
        for path, owner in owners
        for name in defined_parameters(owner)
    ]


def named_places(index: AdapterIndex, config: LoraConfig) -> dict[str, TargetWeight]:
    """Path on disk -> place, of the bare parameters that a config names; its patterns are not looked at.

    Args:
        index: The model's map.
        config: The config.

    Raises:
        TargetError: What it names cannot be adapted.
    """
    if not config.target_parameters:
        return {}
    plain = dataclasses.replace(config, rank_pattern={}, alpha_pattern={})
    matches = targeted_parameters(bare_parameters(index), plain)
    return {place.path: place for _, place in places_of(index, matches)}


def places_of(index: AdapterIndex, matches: Sequence[Match]) -> list[tuple[Match, TargetWeight]]:
    """Every weight that an adapter adapts, with the match that named it.

    Args:
        index: The model's map.
        matches: All that the adapter's config names.

    Returns:
        Pairs; of one module, the place whose layer stands innermost comes first.

    Raises:
        TargetError: A module is named whole and by its parameter, by one adapter or by two.
    """
    found = []
    for match in matches:
        if not match.parameter:
            found += [(match, place) for place in index.places(match.path, index.kind(match.kind))]
    whole = {place.outer: match for match, place in found}
    by_module: dict[str, list[Match]] = {}
    for match in matches:
        if match.parameter:
            by_module.setdefault(match.path, []).append(match)
    for path, named in by_module.items():
        if path in whole:
            _refuse(path, named[0].parameter, type(index.base(path)).__name__)
        owner = index.base(path)
        order = defined_parameters(owner)
        named.sort(key=lambda match: order.index(match.parameter))
        for depth, match in zip(range(len(named))[::-1], named, strict=True):
            place = TargetWeight(path + INSIDE * depth, path, PARAMETER, parameter_slot(owner, match.parameter))
            found.append((match, place))
    check_standing(index, [place for _, place in found])
    return found


def dropout_at(config: LoraConfig, place: TargetWeight, holder: nn.Module) -> float:
    """How much of a site's input is dropped before A.

    Args:
        config: The adapter's config.
        place: The site.
        holder: The base's module that holds its weight.

    Raises:
        ConfigError: Something shall be dropped, and the module never shows what its parameter is multiplied with.
    """
    if place.kind.drops or not config.lora_dropout:
        return config.lora_dropout
    if not place.kind.names_parameter:
        return 0.0
    if not shows_tokens(holder, place.slot.parameter):
        raise ConfigError(
            f"lora.ParamWrapper does not work with lora_dropout != 0: {type(holder).__name__} at {place.outer} never "
            f"shows what its parameter {place.slot.parameter!r} is multiplied with, so nothing of it can be dropped. "
            "Set lora_dropout=0."
        )
    return config.lora_dropout


def paths_on_disk(model: nn.Module | AdapterIndex, adapter: str) -> dict[str, str]:
    """Return path in the model -> path on disk of an adapter's sites: layers of other adapters are not there on disk.

    Args:
        model: The adapted model, or its index.
        adapter: The adapter.
    """
    found = {}
    around: dict[int, list[LoraLayer]] = {}  # id of a layer -> those around it, around the same module
    for path, layer in AdapterIndex.of(model).layers():
        outside = around.get(id(layer), [])
        around[id(layer.base_layer)] = [*outside, layer]
        if adapter in layer.r:
            strangers = sum(adapter not in other.r for other in outside)
            found[path] = path.removesuffix(INSIDE * strangers) if strangers else path
    return found


def check_standing(index: AdapterIndex, places: Sequence[TargetWeight]) -> None:
    """Refuse a module that another adapter has adapted whole, where its parameter is named now, or the other way.

    Args:
        index: The model's map.
        places: The places of one adapter.

    Raises:
        TargetError: The message names the module.
    """
    standing_at = {path for path, m in index.modules.items() if isinstance(m, (LoraLayer, ModulesToSave))}
    taken = sorted(standing_at | {place.outer for place in places})
    for outer in {place.outer for place in places if place.kind.names_parameter}:
        inside = next((path for path in taken if path.startswith(f"{outer}.")), None)
        if inside is not None:
            raise TargetError(
                f"target_parameters names a parameter of {outer}, and {inside} inside it is adapted too; a layer "
                "around the one would hide the other. Leave one of them out."
            )
    for place in places:
        standing = index.modules[place.outer]
        if not isinstance(standing, LoraLayer) or place.child:
            continue
        if standing.kind.names_parameter != place.kind.names_parameter:
            _refuse(place.outer, place.slot.parameter, type(standing.owner).__name__)


def _refuse(path: str, parameter: str, type_name: str) -> None:
    raise TargetError(
        f"Trying to wrap an `nn.Parameter` of layer {path!r} of type {type_name}, which is not a valid target: "
        f"{parameter!r} is named by target_parameters, and the module is adapted whole. Make sure that this layer is "
        "not also targeted with `target_modules`, by this adapter or another; where its names come from the model's "
        "defaults, set `target_modules=[]`."
    )
