"""Find a model's adapted sites and an adapter's target weights, and convert their paths to those in adapter files.

A module with several adapted parameters has one layer per parameter; the parameter defined last has the outermost
layer. Paths in adapter files follow PEFT: they show this nesting instead of the parameters' names, and they include
only the layers of the saved adapter, even if other adapters have layers around the same module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.kinds import PARAMETER, parameter_spec
from lorakit.core.layers.experts import shows_tokens
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.model.index import INSIDE, AdapterIndex, TargetWeight, defined_parameters
from lorakit.errors import ConfigError, TargetError
from lorakit.targets.resolving import BareParameter, Match, Resolution, resolve, targeted_parameters


@dataclass(frozen=True)
class Site:
    """A weight in a model for which at least one adapter has factors.

    Attributes:
        path: Dotted path of the layer in the model.
        kind: Name of the site's kind.
        out_features: Number of rows of the weight in canonical form.
        in_features: Number of columns of the weight in canonical form.
        layer: The adapted layer at the site.
    """

    path: str
    kind: str
    out_features: int
    in_features: int
    layer: LoraLayer


def sites(model: nn.Module) -> list[Site]:
    """Return the adapted sites in model order; empty if the model has no adapters."""
    return [
        Site(path, layer.kind_name, layer.spec.out_features, layer.spec.in_features, layer)
        for path, layer in AdapterIndex.of(model).layers()
    ]


def model_type_of(model: nn.Module) -> str:
    """Return the model type from a model's config (an object or a mapping), or "None" if it has no model type."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        as_dict = getattr(config, "to_dict", None)
        values = as_dict() if callable(as_dict) else config
        model_type = values.get("model_type") if isinstance(values, Mapping) else None
    return str(model_type)


def bare_parameters(index: AdapterIndex) -> list[BareParameter]:
    """Return every parameter of the base that `target_parameters` may name, in definition order.

    Parameters held directly by the model are included for error messages.
    """
    owners = [("", index.model), *((path, index.base(path)) for path in index.modules)]
    return [
        BareParameter(path, name, tuple(getattr(owner, name).shape), _experts_of(owner))
        for path, owner in owners
        for name in defined_parameters(owner)
    ]


def _experts_of(module: nn.Module) -> int:
    """Return the number of experts of a module, as transformers sets it, or 0."""
    count = getattr(module, "num_experts", 0)
    return count if isinstance(count, int) else 0


def matched(index: AdapterIndex, config: LoraConfig, allow_partial: bool = False) -> Resolution:
    """Return the modules and parameters in a model that a config names; see `lorakit.targets.resolving.resolve`.

    Raises:
        TargetError: A target entry matches nothing (unless allowed), or matches a module that cannot be adapted.
    """
    bare = bare_parameters(index) if config.target_parameters else None
    return resolve(index.candidates, config, allow_partial=allow_partial, parameters=bare)


def named_targets(index: AdapterIndex, config: LoraConfig) -> dict[str, TargetWeight]:
    """Return a target weight for each parameter that `target_parameters` names, by path on disk, without patterns."""
    if not config.target_parameters:
        return {}
    plain = dataclasses.replace(config, rank_pattern={}, alpha_pattern={})
    matches = targeted_parameters(bare_parameters(index), plain)
    return {target.path: target for _, target in targets_of(index, matches)}


def targets_of(index: AdapterIndex, matches: Sequence[Match]) -> list[tuple[Match, TargetWeight]]:
    """Return every weight that an adapter targets, with the match that selected it, given all matches of the config.

    Within a module, the weight with the innermost layer comes first.

    Raises:
        TargetError: A module and one of its parameters are both targets of this adapter or of different adapters.
    """
    pairs = []
    by_module: dict[str, list[Match]] = {}
    for match in matches:
        if match.parameter:
            by_module.setdefault(match.path, []).append(match)
        else:
            pairs += [(match, target) for target in index.targets(match.path, index.kind(match.kind))]
    whole = {target.outer for _, target in pairs}
    for path, named in by_module.items():
        if path in whole:
            raise _overlap_error(path, named[0].parameter, type(index.base(path)).__name__)
        owner = index.base(path)
        order = defined_parameters(owner)
        named.sort(key=lambda match: order.index(match.parameter))
        for depth, match in zip(reversed(range(len(named))), named, strict=True):
            weight = TargetWeight(path + INSIDE * depth, path, PARAMETER, parameter_spec(owner, match.parameter))
            pairs.append((match, weight))
    check_overlap(index, [target for _, target in pairs])
    return pairs


def dropout_at(config: LoraConfig, target: TargetWeight, holder: nn.Module) -> float:
    """Return the dropout for the input to A at a site; raise a ConfigError if its module does not expose that input."""
    if target.kind.drops or not config.lora_dropout:
        return config.lora_dropout
    if target.kind.names_parameter and not shows_tokens(holder, target.spec.parameter):
        text = (
            f"lora.ParamWrapper does not work with lora_dropout != 0: {type(holder).__name__} at {target.outer} does "
            f"not expose the input of its parameter {target.spec.parameter!r}. Set lora_dropout=0, or "
            "leave the parameter out of the targets."
        )
        raise ConfigError(text, what=config.lora_dropout, where=target.outer, field="lora_dropout")
    return config.lora_dropout if target.kind.names_parameter else 0.0


def paths_on_disk(model: nn.Module | AdapterIndex, adapter: str) -> dict[str, str]:
    """Return the on-disk path of each of an adapter's sites by path in the model, without layers of other adapters."""
    paths = {}
    around: dict[int, list[LoraLayer]] = {}  # id of a layer -> layers around it
    for path, layer in AdapterIndex.of(model).layers():
        outside = around.get(id(layer), [])
        around[id(layer.base_layer)] = [*outside, layer]
        if adapter in layer.r:
            strangers = sum(adapter not in other.r for other in outside)
            paths[path] = path.removesuffix(INSIDE * strangers) if strangers else path
    return paths


def check_overlap(index: AdapterIndex, targets: Sequence[TargetWeight]) -> None:
    """Raise a TargetError if a module is adapted both as a whole and through a parameter, by any adapters."""
    adapted = {path for path, m in index.modules.items() if isinstance(m, (LoraLayer, ModulesToSave))}
    taken = sorted(adapted | {target.outer for target in targets})
    for outer in {target.outer for target in targets if target.kind.names_parameter}:
        inside = next((path for path in taken if path.startswith(f"{outer}.")), None)
        if inside is not None:
            text = (
                f"target_parameters names a parameter of {outer}, but the submodule {inside} is adapted too; a layer "
                "around the parent module would hide the submodule. Remove one of the two targets."
            )
            raise TargetError(text, what=inside, where=outer, field="target_parameters")
    for target in targets:
        if target.child and f"{target.outer}.{target.child}" in taken:
            text = f"{target.outer} is targeted as a whole, and so is its {target.child}; remove one of them."
            raise TargetError(text, what=f"{target.outer}.{target.child}", where=target.outer, field="target_modules")
        layer = index.modules[target.outer]
        if not isinstance(layer, LoraLayer) or target.child:
            continue
        if layer.kind.names_parameter != target.kind.names_parameter:
            raise _overlap_error(target.outer, target.spec.parameter, type(layer.owner).__name__)


def _overlap_error(path: str, parameter: str, type_name: str) -> TargetError:
    text = (
        f"Trying to wrap an `nn.Parameter` of layer {path!r} of type {type_name}, which is not a valid target: "
        f"target_parameters names {parameter!r}, but the module is adapted as a whole. Make sure that this layer is "
        "not also targeted with `target_modules`, by this adapter or another; if it is a default target of the model, "
        "set `target_modules=[]`."
    )
    return TargetError(text, what=parameter, where=path, field="target_parameters")
