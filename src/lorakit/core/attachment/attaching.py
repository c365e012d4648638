"""Attach adapters to a model and detach them; choose which are active.

Everything is checked and built off the model first and put in place in one step that cannot fail, so that a
refused call leaves the model as it was. The base is frozen while adapters sit on it and gets its
`requires_grad` flags back with the last of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.architectures.default_targets import DEFAULT_TARGETS
from lorakit.config import LoraConfig, scale
from lorakit.core.attachment.build import Part, fresh_extras, fresh_parts, keep_off, notes_on_moving, put_rows
from lorakit.core.attachment.residual_base import give_base_back
from lorakit.core.kinds import Kind
from lorakit.core.layers.adapter_component import trainable_tensors
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import Extras, ModulesToSave
from lorakit.core.layers.named_layers import layer_class
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.merging.checks import check_unmergeable
from lorakit.core.merging.merging import merged_adapters, unmerge
from lorakit.core.model.activation import adapter_parameters
from lorakit.core.model.checks import (
    check_allowances,
    check_bias_alone,
    check_called,
    check_known,
    check_new_name,
    check_scales,
)
from lorakit.core.model.index import Place, SiteMap, find_state, layers, state_of, survey
from lorakit.core.model.replication import stacked_for
from lorakit.core.model.target_weights import bare_parameters
from lorakit.core.model.ties import tie_factors, with_ties
from lorakit.core.quantization import hold_still, let_go
from lorakit.core.routing.positions import install, uninstall
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.core.statistics.stored import Statistics
from lorakit.errors import ConfigError
from lorakit.targets import Match, Note, Unmatched, match_path, resolve


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did.

    Attributes:
        name: The adapter.
        matches: The sites, with rank, alpha and the entry that named each.
        trainable_parameters: Numbers that will be trained.
        notes: Remarks that a person should read; `str` gives the sentence.
        missing: Entries that name nothing (with "partial_targets" allowed); likewise.
    """

    name: str
    matches: tuple[Match, ...]
    trainable_parameters: int
    notes: tuple[Note, ...]
    missing: tuple[Unmatched, ...]


@trainable_tensors
def attach(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    *,
    allow: Collection[str] = (),
    seed: int | None = None,
    statistics: Statistics | None = None,
    kinds: Iterable[Kind] = (),
) -> AttachReport:
    """Put a fresh adapter on a model. The first one becomes active; later ones wait for `activate` or `use`.

    Args:
        model: The base, or a model that has adapters already. It is changed in place.
        config: How the adapter looks; it is copied.
        name: Its name.
        allow: Refusals to lift: "partial_targets", "odd_scale".
        seed: Seed for the fresh factors; None draws from torch's own generator.
        statistics: What `collect_for` made of the data, for an init that looks at data.
        kinds: Kinds of site of the user's own; loading the adapter needs them again.

    Returns:
        What was attached.

    Raises:
        ConfigError: The config does not fit this model or the statistics, or a name in `allow` is unknown.
        BaseMismatchError: The statistics were collected on another base.
        TargetError: A target matches nothing, or what it matches cannot take factors.
        AdapterError: The name is taken or cannot be used.
        NotYetSupported: The config asks for what is not built yet.
    """
    check_allowances(allow)
    state = find_state(model)
    check_new_name(state, name)
    config = with_targets(config, model)
    check_bias_alone(state, config)
    if statistics is not None:
        statistics.check(config, model)
    with stacked_for(model, config, state):
        site_map = survey(model, kinds)
        bare = bare_parameters(site_map, model) if config.target_parameters else None
        found = resolve(site_map.candidates, config, allow_partial="partial_targets" in allow, parameters=bare)
        ties = with_ties(model, site_map, config, found)
        found = ties.found
        check_called(model, [match.path for match in found.matches])
        check_scales([(match_path(m), scale(m.rank, m.alpha, config.use_rslora)) for m in found.matches], allow)
        parts = fresh_parts(site_map, config, found.matches, seed, statistics)
        outer = {part.place.outer for part in parts}
        publish(model, site_map, name, config, parts, fresh_extras(model, site_map, config, outer, ties))
    trained = sum(parameter.numel() for parameter in adapter_parameters(model, name) if parameter.requires_grad)
    return AttachReport(name, found.matches, trained, (*found.notes, *notes_on_moving(config, parts)), found.missing)


@trainable_tensors
def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off a model, or all of them; the base gets its bits and flags back.

    Args:
        model: An adapted model, changed in place.
        name: The adapter, or None for all.

    Raises:
        AdapterError: There is no such adapter.
        MergeError: It is merged, and the base's bits were not kept.
    """
    state = state_of(model)
    names = list(state.configs) if name is None else [name]
    check_known(state, names)
    merged = [n for n in names if n in merged_adapters(model)]
    check_unmergeable(model, merged)
    if merged:
        unmerge(model, *merged)
    site_map = survey(model)
    for module in site_map.modules.values():
        _forget(module, names, site_map)
    if state.biased:
        _drop_bias_switches(model, names)
    waited = any(config.alora_invocation_tokens is not None for config in state.configs.values())
    for gone in names:
        del state.configs[gone]
    if waited and not any(config.alora_invocation_tokens is not None for config in state.configs.values()):
        uninstall(model)
    state.default = Route(tuple(n for n in state.default.names if n not in names))
    if not state.configs:
        for parameter, trained in state.frozen:
            parameter.requires_grad_(trained)
        let_go(state.held)
        if state.replication is not None:
            state.replication.undo()


def publish(
    model: nn.Module,
    site_map: SiteMap,
    name: str,
    config: LoraConfig,
    parts: Sequence[Part],
    extras: Extras,
) -> None:
    """Put a built adapter in place; nothing here can refuse.

    Args:
        model: The model, changed in place.
        site_map: Its map, made since the last change.
        name: The adapter.
        config: Its config, ours to keep.
        parts: Its factors.
        extras: Its copied modules and biases.
    """
    state = find_state(model)
    if state is None:
        state = AdapterState()
        state.held = hold_still(model)
        state.frozen = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in state.frozen:
            parameter.requires_grad_(False)
        state.default = Route((name,))
    state.configs[name] = config
    state.kinds = site_map.own
    for part in parts:
        layer = site_map.layer(part.place) or site_map.put(part.place, _maker(part.place, state))
        layer.put(name, part.factor, part.r, part.lora_alpha, part.trains)
        if part.moved is not None:
            layer.move_base(name, part.moved, part.initial)
    for path, duplicate in extras.copies.items():
        holder = site_map.modules[path]
        if not isinstance(holder, ModulesToSave):
            holder = ModulesToSave(holder, state)
            site_map.replace(site_map.modules[path], holder)
        holder.put(name, duplicate)
    tie_factors(site_map, name, extras.leaders)
    put_rows(site_map, name, extras.rows, state)
    for module, originals in extras.biases:
        BiasPatch.install(name, originals, module, state)
    if config.alora_invocation_tokens is not None:
        install(model, state)
    if state.biased:
        _tell_sites_of_old_biases(model)
    keep_off(site_map.modules.values())


def _maker(place: Place, state: AdapterState) -> Callable[[nn.Module], LoraLayer]:
    made = layer_class(place.kind)
    return lambda module: made(module, place.kind, place.slot, state)


def with_targets(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """A copy of a config, with the field's default targets for this architecture where it names none.

    Raises:
        ConfigError: It names none, and there is no default for this architecture.
    """
    model_type = model_type_of(model)
    if config.target_modules is not None or (config.target_parameters and model_type not in DEFAULT_TARGETS):
        return dataclasses.replace(config)
    if model_type not in DEFAULT_TARGETS:
        raise ConfigError(
            "Please specify `target_modules` in `peft_config`: it is not set, and there is no default for a "
            f"{type(model).__name__}. Name the modules to adapt, or use 'all-linear'.",
            what=model_type,
            field="target_modules",
            allowed=("all-linear",),
        )
    default = DEFAULT_TARGETS[model_type]
    return dataclasses.replace(config, target_modules=default if isinstance(default, str) else set(default))


def model_type_of(model: nn.Module) -> str:
    """What a model's config, an object or a table, says its architecture is; "None" where it does not.

    Args:
        model: Any model.
    """
    config = getattr(model, "config", None)
    said = getattr(config, "model_type", None)
    if not isinstance(said, str):
        as_table = getattr(config, "to_dict", None)
        table = as_table() if callable(as_table) else config
        said = table.get("model_type") if isinstance(table, Mapping) else None
    return str(said)


def _forget(module: nn.Module, names: Sequence[str], site_map: SiteMap) -> None:
    if isinstance(module, LoraLayer):
        owner, children = module.owner, module.kind.inner
        standing = _without(module, names)
        if standing is not module:
            site_map.replace(module, standing)
        for child in children:
            owner._modules[child] = _without(owner._modules[child], names)  # type: ignore[arg-type]
    elif isinstance(module, (ModulesToSave, TrainableTokens)):
        for name in names:
            module.remove(name)
        if not module.available_adapters():
            site_map.replace(module, module.original_module)
            module.state.leave(module)


def _without(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """What stands at a site when some adapters have left: a layer without any leaves too."""
    if not isinstance(module, LoraLayer):
        return module
    for name in names:
        if name == module.moved_by:
            give_base_back(module)
        module.remove(name)
    base_layer: nn.Module = module._modules["base_layer"]  # type: ignore[assignment]
    inside = _without(base_layer, names)
    if inside is not base_layer:
        module.base_layer = inside
    if module.r:
        return module
    module.state.leave(module)
    return inside


def _drop_bias_switches(model: nn.Module, names: Sequence[str]) -> None:
    for module in model.modules():
        BiasPatch.uninstall(module, names)
    _tell_sites_of_old_biases(model)


def _tell_sites_of_old_biases(model: nn.Module) -> None:
    for _, layer in layers(model):
        found = [(s.adapter, s.originals["bias"]) for s in BiasPatch.on(layer.owner) if "bias" in s.originals]
        layer.old_bias = found[0] if found else None
