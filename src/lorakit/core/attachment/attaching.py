"""Attach adapters to a model and detach them; choose which are active.

Everything is checked and built off the model first and put in place in one step that cannot fail, so that a
refused call leaves the model as it was. The base is frozen while adapters sit on it and gets its
`requires_grad` flags back with the last of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.architectures.default_targets import DEFAULT_TARGETS
from lorakit.config import LoraConfig, scale
from lorakit.core.attachment.build import (
    NewAdapter,
    NewFactor,
    commit,
    fresh_factors,
    new_extras,
    new_rows,
    note_old_biases,
)
from lorakit.core.attachment.residual_base import give_base_back, mover_of
from lorakit.core.kinds import Kind
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.merging.merging import unmerge
from lorakit.core.model.checks import check_allowances, check_called, check_company, check_new_name, check_scales
from lorakit.core.model.index import AdapterIndex, check_known, trainable_block
from lorakit.core.model.replication import stacked_for
from lorakit.core.model.target_weights import bare_parameters
from lorakit.core.model.ties import with_ties
from lorakit.core.model.vocabulary import chosen_rows
from lorakit.core.quantization import allow_repacking
from lorakit.core.routing.positions import uninstall
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.core.statistics.moments import Statistics
from lorakit.errors import ConfigError
from lorakit.tables import format_bytes
from lorakit.targets import Match, Note, Resolution, Unmatched, match_path, resolve


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
    index = AdapterIndex.of(model, kinds)
    check_new_name(index.state, name)
    config = with_targets(config, model)
    check_company(index.state, config)
    if statistics is not None:
        statistics.check(config, index)
    with trainable_block(index), stacked_for(index, config) as index:
        found, leaders = _resolved(index, config, allow)
        factors = fresh_factors(index, config, found.matches, seed, statistics)
        rows = new_rows(index, chosen_rows(index, config, {f.place.outer for f in factors}, found.saved))
        extras = new_extras(index, config, factors, found.saved, leaders, rows)
        built = NewAdapter(name, config, factors, extras)
        state = commit(index, built)
    notes = (*found.notes, *_notes_on_moving(config, factors))
    return AttachReport(name, found.matches, built.trained_parameters(state), notes, found.missing)


def _resolved(index: AdapterIndex, config: LoraConfig, allow: Collection[str]) -> tuple[Resolution, dict[str, str]]:
    """Return what a config names in a model, with what is tied to it."""
    bare = bare_parameters(index) if config.target_parameters else None
    found = resolve(index.candidates, config, allow_partial="partial_targets" in allow, parameters=bare)
    found, leaders = with_ties(index, config, found)
    check_called(index.model, [match.path for match in found.matches])
    check_scales([(match_path(m), scale(m.rank, m.alpha, config.use_rslora)) for m in found.matches], allow)
    return found, leaders


def _notes_on_moving(config: LoraConfig, factors: Sequence[NewFactor]) -> list[Note]:
    """Return notes on what a moved base costs; none if nothing was moved."""
    costs = [factor.cost for factor in factors if factor.moved is not None]
    if not costs:
        return []
    text = (
        f"{mover_of(config)} moves the base's weight at {len(costs)} sites; the originals and the first "
        f"factors are kept beside it, {format_bytes(sum(cost.kept_bytes for cost in costs))}, so that the base can be "
        "had back."
    )
    notes = [Note("residual_base", text)]
    lost = max(cost.lost for cost in costs)
    if lost:
        text = (
            f"The base is stored in fewer bits, and what {mover_of(config)} left of it was rounded a second "
            f"time, by up to {lost:.2g} of a weight: a fresh adapter is off by as much, and it is no plain LoRA."
        )
        notes.append(Note("rounded_base", text))
    return notes


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off a model, or all of them; the base gets its bits and flags back.

    Args:
        model: An adapted model, changed in place.
        name: The adapter, or None for all.

    Raises:
        AdapterError: There is no such adapter.
        MergeError: It is merged, and the base's bits were not kept.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        state = index.known_state()
        names = list(state.configs) if name is None else [name]
        check_known(state, names)
        there = index.merged_adapters()
        merged = [n for n in names if n in there]
        if merged:
            unmerge(index, *merged)
        _take_off(index, state, names)


def _take_off(index: AdapterIndex, state: AdapterState, names: Sequence[str]) -> None:
    for component in reversed(index.components.values()):  # what is inside another one comes first
        left = [_without(component, name) for name in names][-1]
        if left is not component:
            index.replace(component, left)
            state.leave(component)
    if state.biased:
        for path in index.patches:
            BiasPatch.uninstall(index.everything[path], names)
        note_old_biases(index)
    waited = bool(state.waiting)
    state.waiting = state.waiting.difference(names)
    for gone in names:
        del state.configs[gone]
    if waited and not state.waiting:
        uninstall(index.model)
    state.default = Route(tuple(n for n in state.default.names if n not in names))
    if not state.configs:
        for parameter, trained in state.frozen:
            parameter.requires_grad_(trained)
        allow_repacking(state.held)
        if state.replication is not None:
            state.replication.undo()


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


def _without(component: AdapterModule, name: str) -> nn.Module:
    """Drop what an adapter has in a component, and return the module that belongs there afterwards."""
    if isinstance(component, LoraLayer) and name in component.moved_by:
        give_base_back(component, name)
    return component.remove(name)
