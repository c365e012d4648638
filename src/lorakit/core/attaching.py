"""Attach adapters to a model and detach them; choose which are active.

Everything is checked and built off the model first and put in place in one step that cannot fail, so that a
refused call leaves the model as it was. The base is frozen while adapters sit on it and gets its
`requires_grad` flags back with the last of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig, scale
from lorakit.core.activation import adapter_parameters
from lorakit.core.bases import Base, base_of, hold_still, let_go
from lorakit.core.checks import check_allowances, check_bias_alone, check_known, check_new_name, check_scales
from lorakit.core.extra_parts import fresh_extras
from lorakit.core.extras import BiasSwitch, Extras, ModuleCopies
from lorakit.core.factor import Factor
from lorakit.core.inits import Blank, Filled, fresh_bias, init_for
from lorakit.core.invoking import install, uninstall
from lorakit.core.layer import LoraLayer
from lorakit.core.layer_names import LAYERS
from lorakit.core.merging import check_unmergeable, merged_adapters, unmerge
from lorakit.core.parameter_sites import bare_parameters, dropout_at, places_of
from lorakit.core.replication import stacked_for
from lorakit.core.routing import AdapterState, Route
from lorakit.core.row_parts import put_rows
from lorakit.core.sitemap import Place, SiteMap, find_state, layers, state_of, survey
from lorakit.core.ties import tie_factors, with_ties
from lorakit.core.token_rows import TokenRows
from lorakit.core.variants import variant_for
from lorakit.default_targets import DEFAULT_TARGETS
from lorakit.errors import ConfigError
from lorakit.targets import Match, match_path, resolve


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did.

    Attributes:
        name: The adapter.
        matches: The sites, with rank, alpha and the entry that named each.
        trainable_parameters: Numbers that will be trained.
        notes: Sentences a person should read.
        missing: Entries that named nothing (with "partial_targets" allowed).
    """

    name: str
    matches: tuple[Match, ...]
    trainable_parameters: int
    notes: tuple[str, ...]
    missing: tuple[str, ...]


BOTH = frozenset({"A", "B"})


@dataclass(frozen=True)
class Part:
    """One factor, built but not in place.

    Attributes:
        place: Where it goes.
        factor: What it is.
        r: Its rank.
        lora_alpha: Its alpha.
        moved: What the base's module stores for this adapter, where its init moves the base.
        trains: Which of "A" and "B" are trained.
    """

    place: Place
    factor: Factor
    r: int
    lora_alpha: float
    moved: Any = None
    trains: frozenset[str] = BOTH


def attach(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    *,
    allow: Collection[str] = (),
    seed: int | None = None,
) -> AttachReport:
    """Put a fresh adapter on a model. The first one becomes active; later ones wait for `activate` or `use`.

    Args:
        model: The base, or a model that has adapters already. It is changed in place.
        config: How the adapter looks; it is copied.
        name: Its name.
        allow: Refusals to lift: "partial_targets", "odd_scale".
        seed: Seed for the fresh factors; None draws from torch's own generator.

    Returns:
        What was attached.

    Raises:
        ConfigError: The config does not fit this model, or a name in `allow` is unknown.
        TargetError: A target matches nothing, or what it matches cannot take factors.
        AdapterError: The name is taken or cannot be used.
        NotYetSupported: The config asks for what is not built yet.
    """
    check_allowances(allow)
    state = find_state(model)
    check_new_name(state, name)
    config = with_targets(config, model)
    check_bias_alone(state, config)
    with stacked_for(model, config, state):
        site_map = survey(model)
        bare = bare_parameters(site_map, model) if config.target_parameters else None
        found = resolve(site_map.candidates, config, allow_partial="partial_targets" in allow, parameters=bare)
        ties = with_ties(model, site_map, config, found)
        found = ties.found
        check_scales([(match_path(m), scale(m.rank, m.alpha, config.use_rslora)) for m in found.matches], allow)
        parts = _fresh_parts(site_map, config, found.matches, seed)
        outer = {part.place.outer for part in parts}
        publish(model, site_map, name, config, parts, fresh_extras(model, site_map, config, outer, ties))
    trained = sum(parameter.numel() for parameter in adapter_parameters(model, name))
    return AttachReport(name, found.matches, trained, found.notes, found.missing)


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
    _drop_bias_switches(model, names)
    for gone in names:
        del state.configs[gone]
    if not any(config.alora_invocation_tokens is not None for config in state.configs.values()):
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
    for part in parts:
        layer = site_map.layer(part.place) or site_map.put(part.place, _maker(part.place, state))
        layer.put(name, part.factor, part.r, part.lora_alpha, part.trains)
        if part.moved is not None:
            layer.move_base(name, part.moved)
    for path, duplicate in extras.copies.items():
        holder = site_map.modules[path]
        if not isinstance(holder, ModuleCopies):
            holder = ModuleCopies(holder, state)
            site_map.replace(site_map.modules[path], holder)
        holder.put(name, duplicate)
    tie_factors(site_map, name, extras.leaders)
    put_rows(site_map, name, extras.rows, state)
    for module, originals in extras.biases:
        BiasSwitch.install(name, originals, module, state)
    if config.alora_invocation_tokens is not None:
        install(model, state)
    _tell_sites_of_old_biases(model)


def _maker(place: Place, state: AdapterState) -> Callable[[nn.Module], LoraLayer]:
    return lambda module: LAYERS[place.kind.name](module, place.kind, place.slot, state)


def as_parameters(factor: Factor, trainable: bool = True, trains: frozenset[str] = BOTH) -> Factor:
    """A factor whose tensors are parameters.

    Args:
        factor: With A (r, in), B (out, r) and perhaps a magnitude and a bias (out,) as plain tensors.
        trainable: They require gradients.
        trains: Which of "A" and "B" do at all.

    Returns:
        The factor.
    """
    A, B = nn.Parameter(factor.A, trainable and "A" in trains), nn.Parameter(factor.B, trainable and "B" in trains)
    vector = None if factor.magnitude is None else nn.Parameter(factor.magnitude, trainable)
    bias = None if factor.bias is None else nn.Parameter(factor.bias, trainable)
    return dataclasses.replace(factor, A=A, B=B, magnitude=vector, bias=bias)


def make_dropout(p: float) -> nn.Module:
    """What an input passes before A: nothing where p is 0."""
    return nn.Dropout(p) if p > 0 else nn.Identity()


def with_targets(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """A copy of a config, with the field's default targets for this architecture where it names none.

    Raises:
        ConfigError: It names none, and there is no default for this architecture.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if config.target_modules is not None or (config.target_parameters and model_type not in DEFAULT_TARGETS):
        return dataclasses.replace(config)
    if model_type not in DEFAULT_TARGETS:
        raise ConfigError(
            "Please specify `target_modules` in `peft_config`: it is not set, and there is no default for a "
            f"{type(model).__name__}. Name the modules to adapt, or use 'all-linear'."
        )
    default = DEFAULT_TARGETS[model_type]
    return dataclasses.replace(config, target_modules=default if isinstance(default, str) else set(default))


def factor_dtype(module: nn.Module, parameter: str) -> torch.dtype:
    """The dtype of A and B beside a weight: fp32, or the weight's where it is wider.

    Args:
        module: The module that holds the weight.
        parameter: Its name there.
    """
    weight = module._parameters.get(parameter)
    floats = weight is not None and weight.is_floating_point()
    return torch.promote_types(weight.dtype, torch.float32) if floats else torch.float32  # type: ignore[union-attr]


def _fresh_parts(site_map: SiteMap, config: LoraConfig, matches: Sequence[Match], seed: int | None) -> list[Part]:
    generators = _generators(seed)
    return [_fresh_part(site_map, config, match, place, generators) for match, place in places_of(site_map, matches)]


def _fresh_part(
    site_map: SiteMap,
    config: LoraConfig,
    match: Match,
    place: Place,
    generators: Callable[[torch.device], torch.Generator | None],
) -> Part:
    kind, slot = place.kind, place.slot
    check_bias_of_b(config, place)
    init = init_for(config.init_lora_weights, kind.name, place.path)
    variant = variant_for(config, kind.name, place.path)
    module, standing = site_map.holder(place), site_map.layer(place)
    base = base_of(module, slot.parameter)
    device = base.device(module, slot.parameter)

    def read() -> Tensor:
        return standing.read() if standing is not None else base.read(module, base.stored(module, slot.parameter))

    factor_scale = scale(match.rank, match.alpha, config.use_rslora)
    blank = Blank(
        kind=kind,
        slot=slot,
        r=match.rank,
        scale=factor_scale,
        shapes=kind.shapes(slot, match.rank),
        device=device,
        dtype=factor_dtype(module, slot.parameter),
        path=place.path,
        read=read,
        config=config,
        generator=generators(device),
    )
    filled = init.fill(blank)
    moved = _moved(filled, base, module, standing, place)
    if moved is not None and not variant.mergeable:
        raise ConfigError(
            f"{place.path}: init_lora_weights={config.init_lora_weights!r} moves the base weight, and {variant.name} "
            "needs the base as it is before its start. Use another init."
        )
    magnitude = None
    if variant.has_magnitude:
        W = read() if moved is None else base.read(module, moved)
        magnitude = variant.magnitude(kind, slot, W, filled.A, filled.B, factor_scale).view(kind.vector(slot))
    dropout = make_dropout(dropout_at(config, place, module))
    bias = fresh_bias(blank, not init.is_identity) if config.lora_bias else None
    factor = Factor(filled.A, filled.B, factor_scale, dropout, variant.name, magnitude, bias)
    factor = as_parameters(factor, trains=filled.trains)
    return Part(place, factor, match.rank, match.alpha, moved, filled.trains)


def check_bias_of_b(config: LoraConfig, place: Place) -> None:
    """Refuse `lora_bias` where B makes no output of its own.

    Raises:
        ConfigError: The message names the site and its kind.
    """
    if config.lora_bias and not place.kind.takes_bias:
        raise ConfigError(
            f"lora_bias=True is not supported for {place.path}, a {place.kind.name}: B has no output of its own there. "
            "Leave the module out of the targets, or lora_bias off."
        )


def _moved(filled: Filled, base: Base, module: nn.Module, standing: LoraLayer | None, place: Place) -> Any:
    """What the module shall store where an init moves the base; one adapter of a site can."""
    if filled.W is None:
        return None
    if standing is not None and (standing.moved_by is not None or standing.merged_adapters):
        who = standing.moved_by or standing.merged_adapters[0]
        raise ConfigError(
            f"{place.path}: this init moves the base weight, which adapter {who!r} has moved or is merged into. Detach "
            "or unmerge it first, or use an init that leaves the base alone."
        )
    return base.write(module, base.stored(module, place.slot.parameter), filled.W)


def _generators(seed: int | None) -> Callable[[torch.device], torch.Generator | None]:
    """One seeded generator per device, made when first asked for; None without a seed."""
    made: dict[torch.device, torch.Generator] = {}

    def for_device(device: torch.device) -> torch.Generator | None:
        if seed is None or device.type == "meta":
            return None
        if device not in made:
            made[device] = torch.Generator(device).manual_seed(seed)
        return made[device]

    return for_device


def _forget(module: nn.Module, names: Sequence[str], site_map: SiteMap) -> None:
    if isinstance(module, LoraLayer):
        owner, children = module.owner, module.kind.inner
        standing = _without(module, names)
        if standing is not module:
            site_map.replace(module, standing)
        for child in children:
            owner._modules[child] = _without(owner._modules[child], names)  # type: ignore[arg-type]
    elif isinstance(module, (ModuleCopies, TokenRows)):
        for name in names:
            module.remove(name)
        if not module.available_adapters():
            site_map.replace(module, module.original_module)


def _without(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """What stands at a site when some adapters have left: a layer without any leaves too."""
    if not isinstance(module, LoraLayer):
        return module
    for name in names:
        if name == module.moved_by:
            module.give_base_back()
        module.remove(name)
    module.base_layer = _without(module.base_layer, names)
    return module if module.r else module.base_layer


def _drop_bias_switches(model: nn.Module, names: Sequence[str]) -> None:
    for module in model.modules():
        BiasSwitch.uninstall(module, names)
    _tell_sites_of_old_biases(model)


def _tell_sites_of_old_biases(model: nn.Module) -> None:
    for _, layer in layers(model):
        found = [(s.adapter, s.originals["bias"]) for s in BiasSwitch.on(layer.owner) if "bias" in s.originals]
        layer.old_bias = found[0] if found else None
