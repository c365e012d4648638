"""Attach adapters to a model, detach them, and give one adapted layer new factors.

An adapter is first checked and built outside the model and then attached in one step that cannot fail, so a call that
raises an error leaves the model unchanged. The base is frozen while it has adapters; detaching the last adapter
restores the base's `requires_grad` flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.architectures.families import DEFAULT_TARGETS, EXPERTS_BY_TYPE, TUPLE_ROUTER_BY_TYPE
from lorakit.config import LoraConfig, scale
from lorakit.core.attachment import build
from lorakit.core.attachment.build import fresh_factor
from lorakit.core.attachment.residual_base import give_base_back, mover_of, residual
from lorakit.core.inits import InitContext, init_for
from lorakit.core.kinds import Kind
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import Extras
from lorakit.core.merging import unmerge
from lorakit.core.model import checks
from lorakit.core.model.base_view import unfreeze_base
from lorakit.core.model.checks import check_new_name
from lorakit.core.model.index import AdapterIndex, TargetWeight, trainable_block, without_wrappers
from lorakit.core.model.replication import replication_of, stacked_for
from lorakit.core.model.target_weights import bare_parameters, matched, model_type_of
from lorakit.core.model.ties import with_ties
from lorakit.core.model.vocabulary import chosen_rows
from lorakit.core.quantization import weight_format_of
from lorakit.core.routing.positions import uninstall
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.core.statistics.moments import Statistics
from lorakit.core.variants import Start, variant_for
from lorakit.errors import AdapterError, ConfigError
from lorakit.tables import format_bytes
from lorakit.targets.experts import note_on_rest, with_current_names
from lorakit.targets.resolving import ALL_LINEAR, Match, Note, Resolution, Unmatched, match_path


@dataclass(frozen=True)
class AttachReport:
    """Result of `attach`.

    Attributes:
        matches: The adapted sites, each with its rank, its alpha and the target entry that matched the site.
        trainable_parameters: Number of values that will be trained.
        notes: Notes for the user; `str(note)` gives the message.
        missing: Target entries that matched nothing (only with "partial_targets"); `str(entry)` gives the message.
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
    """Add a new adapter to a model. The first adapter becomes active; activate others with `activate` or `use`.

    Args:
        model: The base, or a model that already has adapters; changed in place.
        config: The adapter's config; it is copied.
        name: The adapter's name.
        allow: Names of checks to override: "partial_targets", "odd_scale".
        seed: Random seed for the initialization; if None, torch's default generator is used.
        statistics: The result of `collect_for`, for initialization methods that use data.
        kinds: Custom site kinds; they must be passed again when the adapter is loaded.

    Raises:
        ConfigError: The config does not match this model or the statistics, or a name in `allow` is unknown.
        BaseMismatchError: The statistics were collected on a different base.
        TargetError: A target matches nothing, or matches a module that cannot be adapted.
        AdapterError: The name is taken or cannot be used.
        NotYetSupported: The config uses a feature that is not implemented.
    """
    checks.check_allowances(allow)
    index = AdapterIndex.of(model, kinds)
    checks.check_new_name(index.state, name)
    original_config, config = config, with_targets(config, index)
    checks.check_company(index.state, config)
    checks.check_acts(index.model, config)
    if statistics is not None:
        statistics.check(config, index)
    with trainable_block(index), stacked_for(index, config) as index:
        resolution, leaders = _resolved(index, config, allow)
        factors = build.fresh_factors(index, config, resolution.matches, seed, statistics)
        rows = build.new_rows(index, chosen_rows(index, config, {f.target.outer for f in factors}, resolution.saved))
        auxiliary = build.new_extras(index, config, factors, resolution.saved, leaders, rows)
        rest = _note_on_rest(index, original_config, config, resolution)
        notes = (*resolution.notes, *rest, *_notes_on_residuals(index, config, factors))
        state = build.commit(index, build.NewAdapter(name, config, factors, auxiliary))
        trained = _trained_values(name, state, auxiliary)
    return AttachReport(name, resolution.matches, trained, notes, resolution.missing)


def _resolved(index: AdapterIndex, config: LoraConfig, allow: Collection[str]) -> tuple[Resolution, dict[str, str]]:
    """Return the matched modules, including tied ones, and a dict from each tied module's path to its embedding's."""
    resolution, leaders = with_ties(index, config, matched(index, config, "partial_targets" in allow))
    checks.check_called(index.model, [match.path for match in resolution.matches])
    checks.check_scales([(match_path(m), scale(m.rank, m.alpha, config.use_rslora)) for m in resolution.matches], allow)
    return resolution, leaders


def _note_on_rest(
    index: AdapterIndex, original_config: LoraConfig, config: LoraConfig, resolution: Resolution
) -> list[Note]:
    """Return a note about matrices that the targets leave out, or []; see `lorakit.targets.experts.note_on_rest`."""
    bare = [parameter for parameter in bare_parameters(index) if len(parameter.shape) in {2, 3}]
    parameters = (parameter for _, module in index.plain_modules() for parameter in module._parameters.values())
    sizes = {id(parameter): parameter.numel() for parameter in parameters if parameter is not None}  # tied weights once
    note = note_on_rest(original_config, config, index.candidates, bare, resolution, sum(sizes.values()))
    return [] if note is None else [note]


def _trained_values(name: str, state: AdapterState, auxiliary: Extras) -> int:
    """Return the number of trainable values in an attached adapter, counting tied parameters once."""
    parameters = [parameter for module in state.members() for parameter in module.parameters_of(name)]
    parameters += [module.get_parameter(leaf) for module, originals in auxiliary.biases for leaf in originals]
    return sum(p.numel() for p in {id(p): p for p in parameters}.values() if p.requires_grad)


def _notes_on_residuals(index: AdapterIndex, config: LoraConfig, factors: Sequence[build.NewFactor]) -> list[Note]:
    """Return notes on the memory use and rounding error of residual bases, or [] if the base is unchanged."""
    moved = [(new, new.stored) for new in factors if new.stored is not None]
    if not moved:
        return []
    kept_bytes, lost, mover = 0, 0.0, mover_of(config)
    for new, stored in moved:
        module, spec = index.holder(new.target), new.target.spec
        base = weight_format_of(module, spec.parameter)
        kept_bytes += sum(t.numel() * t.element_size() for t in (*base.tensors(stored), *(new.initial or ())))
        if base.quantized and new.initial is not None:
            wanted = residual(new.target.kind, spec, index.weight(new.target), new.initial, new.factor.scale)
            error = torch.linalg.vector_norm(base.read(module, stored) - wanted) / torch.linalg.vector_norm(wanted)
            lost = max(lost, float(error))
    text = f"{mover} changes base weights (sites: {len(moved)}); the originals are kept ({format_bytes(kept_bytes)})."
    notes = [Note("residual_base", text)]
    if lost:
        text = (
            f"The base is quantized, so the weights that {mover} changed had to be requantized, with a relative error "
            f"of up to {lost:.2g}. As a result, the adapter changes the output even before training and is not "
            "equivalent to plain LoRA."
        )
        notes.append(Note("rounded_base", text))
    return notes


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove an adapter, or all of them, and restore the base's weights (bit for bit) and `requires_grad` flags.

    Raises:
        AdapterError: The adapter is not on the model.
        MergeError: The adapter is merged, and the original weights were not saved.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        state = index.known_state()
        names = list(state.configs) if name is None else [name]
        state.check(names, AdapterError)
        merged = set(names).intersection(index.merged_adapters())
        if merged:
            unmerge(index, *sorted(merged))
        _take_off(index, state, names)


def _take_off(index: AdapterIndex, state: AdapterState, names: Sequence[str]) -> None:
    for component in reversed(index.components.values()):  # process nested components before those that contain them
        left = _without(component, names)
        if left is not component:
            index.replace(component, left)
            state.leave(component)
    if state.biased:
        for path in index.patches:
            BiasPatch.uninstall(index.everything[path], names)
        build.note_old_biases(index)
    waited = bool(state.waiting)
    state.waiting = state.waiting.difference(names)
    for gone in names:
        del state.configs[gone]
    if waited and not state.waiting:
        uninstall(index.model)
    state.default = Route(tuple(n for n in state.default.names if n not in names))
    if not state.configs:
        unfreeze_base(index)
        replication = replication_of(index)
        if replication is not None:
            replication.undo()


def _without(component: AdapterModule, names: Sequence[str]) -> nn.Module:
    """Remove adapters from a component; return the component, or its base module if no adapters are left."""
    left: nn.Module = component
    for name in names:
        if isinstance(component, LoraLayer) and name in component.moved_by:
            give_base_back(component, name)
        left = component.remove(name)
    return left


def with_targets(config: LoraConfig, model: nn.Module | AdapterIndex) -> LoraConfig:
    """Return a copy of a config with the targets that apply to a model.

    If the config names no targets, PEFT's default targets for the architecture are added. Names that transformers 4
    used in models with experts are converted.

    Raises:
        ConfigError: The config names no targets, and the architecture has no default; or old names cannot be converted.
        TargetError: The config names an expert that does not exist.
    """
    plain = model.model if isinstance(model, AdapterIndex) else model
    complete, model_type = _unwrapped(_with_default(config, plain)), model_type_of(plain)
    if model_type not in EXPERTS_BY_TYPE and model_type not in TUPLE_ROUTER_BY_TYPE:
        return complete
    index = AdapterIndex.of(model)
    return with_current_names(complete, model_type, index.candidates, bare_parameters(index))


def _unwrapped(config: LoraConfig) -> LoraConfig:
    """Convert names of wrapped modules (torch.compile, activation checkpointing) in a config's lists to plain names."""
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        names = getattr(config, field)
        if isinstance(names, (list, set)):
            setattr(config, field, type(names)(map(without_wrappers, names)))
    return config


def _with_default(config: LoraConfig, model: nn.Module) -> LoraConfig:
    model_type = model_type_of(model)
    if config.target_modules is not None or (config.target_parameters and model_type not in DEFAULT_TARGETS):
        return dataclasses.replace(config)
    if model_type not in DEFAULT_TARGETS:
        text = (
            "Please specify `target_modules` in `peft_config`: it is not set, and there is no default for a "
            f"{type(model).__name__}. Name the modules to adapt, or use 'all-linear'."
        )
        raise ConfigError(text, what=model_type, field="target_modules", allowed=(ALL_LINEAR,))
    default = DEFAULT_TARGETS[model_type]
    return dataclasses.replace(config, target_modules=default if isinstance(default, str) else set(default))


LAYER = "layer"


def put_fresh_factor(layer: LoraLayer, name: str, config: LoraConfig, rank: int, alpha: float, path: str = "") -> None:
    """Give a layer new factors for an adapter; existing factors of the adapter are replaced.

    If the model has no adapter of this name, its config is added to those of the model. The rank and alpha patterns of
    the config are ignored; `path` is for messages and for settings that depend on it.

    Raises:
        AdapterError: `name` cannot be the name of an adapter.
        ConfigError: The rank is below 1, or the init or the variant is not supported in this layer or needs the model.
        MergeError: The adapter is merged into this layer.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError.of("r", rank, "a positive integer value")
    if name not in layer.state.configs:
        check_new_name(layer.state, name)
    layer.check_not_merged(path, [name])
    _check_alone(layer, config, path)
    index = AdapterIndex.of(nn.ModuleDict({LAYER: layer}))  # an index needs a model around the layer
    target = TargetWeight(path or LAYER, LAYER, layer.kind, layer.spec)
    match = Match(LAYER, layer.kind_name, rank, alpha, "")
    new = fresh_factor(index, config, match, target, lambda _: None, None)
    if name in layer.moved_by:
        give_base_back(layer, name)
    override, aside = layer.own_route, layer.aside
    layer.remove(name)
    layer.state.configs.setdefault(name, config.with_fields())
    layer.put(name, new.factor, rank, alpha, new.trains)
    layer.own_route, layer.aside = override, aside


def _check_alone(layer: LoraLayer, config: LoraConfig, path: str) -> None:
    """Check that a config's init and variant need no more than one layer."""
    init, (variant, _) = init_for(config.init_lora_weights, layer.kind, path), variant_for(config, layer.kind, path)
    is_variant = bool(variant.move or variant.invocation)
    if not (init.changes_base or init.needs or is_variant):
        return
    what = variant.title if is_variant else f"init_lora_weights={init.name!r}"
    text = f"{what} changes base weights, needs data or concerns the whole model; attach the adapter to the model."
    raise ConfigError(text, what=what, where=path or None, field=variant.field if is_variant else "init_lora_weights")


def reset_factor(layer: LoraLayer, name: str, init_lora_weights: bool | str) -> None:
    """Initialize an adapter's A and B, and the bias of B, again; the tensors keep their shapes and dtypes.

    A variant's extra tensors change only if the variant, not the init, defines how A and B start. The init is True,
    "gaussian", or False, which leaves the factors unchanged, as in PEFT.

    Raises:
        ConfigError: The init is unknown, or needs data or the base weight.
        MergeError: The adapter is merged into this layer.
    """
    if init_lora_weights is False or name not in layer.r:
        return
    init = init_for(init_lora_weights, layer.kind, layer.kind_name)
    factor, config = layer.factor(name), layer.state.configs[name]
    if not init.takes_any_shape or checks.conflict(init, factor.variant):
        raise ConfigError.of("init_lora_weights", init_lora_weights, "True, False or 'gaussian' for a single layer")
    layer.check_not_merged(layer.kind_name, [name])
    context = InitContext(
        kind=layer.kind,
        spec=layer.spec,
        r=layer.r[name],
        scale=factor.scale,
        A_shape=tuple(factor.A.shape),
        B_shape=tuple(factor.B.shape),
        device=factor.A.device,
        dtype=factor.A.dtype,
        path=layer.kind_name,
        read=layer.read,
        config=config,
    )
    with torch.no_grad():
        result, parts = init.fill(context), factor.variant.parts
        start = Start(
            layer.kind, layer.spec, result.A, result.B, factor.scale, layer.read, layer.kind_name, factor.setting
        )
        A, B = parts.factors(start)
        factor.A.copy_(A)
        factor.B.copy_(B)
        if parts.start is not None:
            for name_in_layer, tensor in parts.extra_tensors(dataclasses.replace(start, A=A, B=B)).items():
                factor.own[name_in_layer].copy_(tensor)
        if factor.bias is not None:
            factor.bias.zero_()
