"""An adapter built off a model: factors, saved modules, trained rows and biases; and the step that puts it in place.

`attach` and `load_adapter` make the same records in two ways, from an init and from files. Nothing here changes a model
but `commit`, which cannot refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.residual_base import (
    UNMOVED,
    MoveCost,
    check_can_move,
    cost_of,
    init_context_for,
    moved_base,
    written,
)
from lorakit.core.factor import make_dropout
from lorakit.core.inits import Init, InitContext, fresh_bias, init_for
from lorakit.core.inits.init import BOTH
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import Extras, ModulesToSave, build_extras
from lorakit.core.layers.named_layers import layer_class
from lorakit.core.layers.trainable_tokens import ChosenRows, TrainableTokens
from lorakit.core.model.index import AdapterIndex, TargetWeight, walk
from lorakit.core.model.target_weights import dropout_at, places_of
from lorakit.core.model.ties import tie_copies, tie_factors
from lorakit.core.quantization import disable_repacking, weight_format_of
from lorakit.core.routing.positions import install
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.core.statistics.moments import Statistics
from lorakit.core.variants import Factor, Start, Variant, variant_for, variants_of
from lorakit.errors import ConfigError
from lorakit.targets import Match


@dataclass(frozen=True)
class NewFactor:
    """One factor, built but not in place.

    Attributes:
        place: Where it goes.
        factor: What it is.
        r: Its rank.
        lora_alpha: Its alpha.
        moved: What the base's module stores for this adapter, if its init moved the base.
        trains: Which of "A" and "B" are trained.
        initial: A (r, in) and B (out, r) as they were when the base became W − s·B·A, or None.
        cost: What moving the base costs.
    """

    place: TargetWeight
    factor: Factor
    r: int
    lora_alpha: float
    moved: Any = None
    trains: frozenset[str] = BOTH
    initial: tuple[Tensor, Tensor] | None = None
    cost: MoveCost = UNMOVED


@dataclass(frozen=True)
class NewAdapter:
    """An adapter, built but not in place.

    Attributes:
        name: Its name.
        config: Its config, which the model keeps.
        factors: Its factors.
        extras: Its saved modules, trained rows and biases.
        bias_values: Parameters of the base that it trains, each with the values, (out,), that it gets.
        trainable: It is trained, but for what its init freezes.
    """

    name: str
    config: LoraConfig
    factors: Sequence[NewFactor]
    extras: Extras
    bias_values: Sequence[tuple[nn.Parameter, Tensor]] = ()
    trainable: bool = True

    def trained_parameters(self, state: AdapterState) -> int:
        """Return how many values it trains, once it is in place; tied parameters count once.

        Args:
            state: The model's state.
        """
        found = [parameter for module in state.members() for parameter in module.parameters_of(self.name)]
        found += [module._parameters[leaf] for module, originals in self.extras.biases for leaf in originals]
        return sum(p.numel() for p in {id(p): p for p in found}.values() if p.requires_grad)


def fresh_factors(
    index: AdapterIndex, config: LoraConfig, matches: Sequence[Match], seed: int | None, statistics: Statistics | None
) -> list[NewFactor]:
    """Build initialized factors for every site that a config names; their order draws the random numbers.

    Args:
        index: The model's index.
        config: The adapter's config.
        matches: The sites, with rank and alpha.
        seed: Seed, or None for torch's own generator.
        statistics: What was made of the data, or None.

    Raises:
        ConfigError: The init or the variant does not fit a site.
    """
    generators = _generators(seed)
    factors = []
    for match, place in places_of(index, matches):
        seen = None if statistics is None else statistics.sites.get(place.path)
        usual = statistics is not None and seen is None and statistics.others_usual
        asked = config.with_fields(init_lora_weights=True) if usual else config
        blank = init_context_for(index, asked, match, place, generators, seen)
        factors.append(_fresh_factor(index, blank, match, place))
    return factors


def _fresh_factor(index: AdapterIndex, blank: InitContext, match: Match, place: TargetWeight) -> NewFactor:
    config, kind, slot = blank.config, place.kind, place.slot
    check_bias_of_b(config, place)
    check_storage(index, place)
    init = init_for(config.init_lora_weights, kind, place.path)
    variant, setting = variant_for(config, kind, place.path)
    if init.changes_base:
        check_can_move(index, place, init)
    _check_start(init, variant, place)
    with torch.no_grad():
        filled = init.fill(blank)
    initial = (filled.A, filled.B) if init.changes_base and filled.W is None else None
    moved = None
    if initial is not None:
        moved = moved_base(index, place, initial, blank.scale)
    elif filled.W is not None:
        moved = written(index, place, filled.W)
    module = index.holder(place)

    def read() -> Tensor:
        return blank.read() if moved is None else weight_format_of(module, slot.parameter).read(module, moved)

    start = Start(kind, slot, filled.A, filled.B, blank.scale, read, place.path, setting, blank.generator)
    if variant.move is not None:
        moved = moved_for(variant, index, place, start)
    own = variant.starts(start)
    dropout = make_dropout(dropout_at(config, place, module))
    bias = fresh_bias(blank, not init.is_identity) if config.lora_bias else None
    factor = Factor(filled.A, filled.B, blank.scale, dropout, variant, own, bias, setting)
    factor = as_parameters(factor, trains=init.trains)
    cost = UNMOVED if moved is None else cost_of(index, place, moved, initial, blank.scale)
    return NewFactor(place, factor, match.rank, match.alpha, moved, init.trains, initial, cost)


def _check_start(init: Init, variant: Variant, place: TargetWeight) -> None:
    """Refuse an init that moves the base for a variant that moves it too, acts on a part of it, or has other shapes."""
    what = "moves the base weight"
    if init.changes_base and variant.move is not None:
        needs = "moves it too"
    elif init.changes_base and not variant.is_mergeable:
        needs = "needs the base as it is before its start"
    elif variant.shapes is not None and not init.takes_any_shape:
        what, needs = "needs A and B in their usual shapes", "has others"
    else:
        return
    raise ConfigError(
        f"{place.path}: init_lora_weights={init.name!r} {what}, and {variant.title} {needs}. Use another init.",
        what=init.name,
        where=place.path,
        field="init_lora_weights",
    )


def moved_for(variant: Variant, index: AdapterIndex, place: TargetWeight, start: Start) -> Any:
    """Return what a site's module stores while an adapter is attached whose variant moves the base.

    Adapters of the same variant and rank share it.

    Args:
        variant: The variant, which has a `move`.
        index: The model's map.
        place: The site.
        start: The factor there, with A (r, in) and B (out, r).

    Raises:
        ConfigError: The base is quantised, or was moved otherwise or merged into already.
    """
    if variant.move is None:
        return None
    standing = index.layer(place)
    if standing is not None and standing.moved_by:
        first = standing.moved_by[0]
        if standing.factor(first).variant is variant and standing.r[first] == start.rank:
            return standing.moved
    check_can_move(index, place, mover=variant.title)
    weight_format = weight_format_of(index.holder(place), place.slot.parameter)
    if weight_format.quantized:
        raise ConfigError(
            f"{place.path}: {variant.title} moves the base weight, and this one is quantised: what is left would be "
            "rounded a second time. Attach to the base as it was before it was quantised, or leave the module out.",
            what=weight_format.name,
            where=place.path,
            field=variant.field,
        )
    with torch.no_grad():
        return written(index, place, variant.move(start))


def as_parameters(factor: Factor, trainable: bool = True, trains: frozenset[str] = BOTH) -> Factor:
    """A factor whose tensors are parameters.

    Args:
        factor: With A (r, in), B (out, r), perhaps a bias (out,) and own tensors (…), all as plain tensors.
        trainable: They require gradients.
        trains: Which of "A" and "B" do at all.

    Returns:
        The factor.
    """
    A, B = nn.Parameter(factor.A, trainable and "A" in trains), nn.Parameter(factor.B, trainable and "B" in trains)
    frozen = {tensor.held_as for tensor in factor.variant.tensors if not tensor.trained}
    own = {name: nn.Parameter(tensor, trainable and name not in frozen) for name, tensor in factor.own.items()}
    bias = None if factor.bias is None else nn.Parameter(factor.bias, trainable)
    return dataclasses.replace(factor, A=A, B=B, own=own, bias=bias)


def check_storage(index: AdapterIndex, place: TargetWeight) -> None:
    """Refuse to act on a weight that would be rounded to few bits in each forward, and pass no gradient.

    Raises:
        ConfigError: The message names the site and its storage.
    """
    base = weight_format_of(index.holder(place), place.slot.parameter)
    if place.kind.acts_on == "weight" and base.quantized:
        raise ConfigError(
            f"{place.path} is stored as {base.name}, and a {place.kind.name} is adapted by its weight, which would be "
            "rounded with its update in each forward. Name a dense layer in target_modules, where the adapter acts "
            "beside the weight, or leave it out.",
            where=place.path,
            field="target_modules",
        )


def check_bias_of_b(config: LoraConfig, place: TargetWeight) -> None:
    """Refuse `lora_bias` where B makes no output of its own.

    Raises:
        ConfigError: The message names the site and its kind.
    """
    if config.lora_bias and not place.kind.takes_bias:
        raise ConfigError(
            f"lora_bias=True is not supported for {place.kind.name}, at {place.path}: B has no output of its own "
            "there. Leave the module out of the targets, or lora_bias off.",
            where=place.path,
            field="lora_bias",
        )


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


def new_extras(
    index: AdapterIndex,
    config: LoraConfig,
    factors: Sequence[NewFactor],
    saved: Sequence[str],
    leaders: Mapping[str, str],
    rows: Sequence[tuple[ChosenRows, nn.Parameter]],
) -> Extras:
    """Build what an adapter trains in addition to its factors.

    Args:
        index: The model's index.
        config: The adapter's config.
        factors: Its factors.
        saved: Paths of its saved modules.
        leaders: Path of a module -> path of the one to which it is tied.
        rows: Its trained rows.

    Raises:
        TargetError: Another part of an adapter is in the way.
        ConfigError: A bias cannot be trained.
    """
    outer = {factor.place.outer for factor in factors}
    extras = build_extras(index.modules, outer, saved, config.bias)
    tie_copies(extras.copies, leaders)
    return dataclasses.replace(extras, rows=tuple(rows), leaders=leaders)


def new_rows(
    index: AdapterIndex, chosen: Sequence[ChosenRows], given: Mapping[str, Tensor] | None = None, trainable: bool = True
) -> list[tuple[ChosenRows, nn.Parameter]]:
    """Make an adapter's rows: as the base has them, so that a fresh adapter changes nothing, or as they are given.

    Args:
        index: The model's index.
        chosen: Which.
        given: Path of a table -> its rows, (n, d); None for fresh ones.
        trainable: They require gradients.

    Returns:
        The rows, on their table's device, in fp32 or wider.
    """
    made = []
    for part in chosen:
        standing = index.modules[part.path]
        table: Tensor = index.base(part.path)._parameters["weight"]  # type: ignore[assignment]
        if isinstance(standing, TrainableTokens):
            table = standing.token_adapter.original()
        if given is None:
            rows = table.detach()[torch.tensor(part.indices, device=table.device)]
        else:
            rows = given[part.path].to(table.device)
        wide = torch.promote_types(table.dtype, torch.float32)
        made.append((part, nn.Parameter(rows.to(wide, copy=True), trainable)))
    return made


def commit(index: AdapterIndex, built: NewAdapter) -> AdapterState:
    """Put a built adapter in place; nothing here can refuse.

    Args:
        index: The model's index, made since its last change.
        built: The adapter.

    Returns:
        The model's state.
    """
    name, extras = built.name, built.extras
    state = _new_state(index, name) if index.state is None else index.state
    index.state = state
    state.configs[name] = built.config
    state.kinds = index.kinds
    for factor in built.factors:
        layer = index.layer(factor.place) or index.put(factor.place, _maker(factor.place, state))
        layer.put(name, factor.factor, factor.r, factor.lora_alpha, factor.trains)
        if factor.moved is not None:
            layer.move_base(name, factor.moved, factor.initial)
    _put_copies(index, built, state)
    tie_factors(index, name, extras.leaders)
    for chosen, rows in extras.rows:
        _put_rows(index, name, chosen, rows, state)
    for module, originals in extras.biases:
        BiasPatch.install(name, originals, module, state)
    for parameter, values in built.bias_values:
        parameter.data = values
    if not built.trainable:
        _freeze(built, state)
    if any(variant.positions is not None for variant in variants_of(built.config)):
        state.waiting |= {built.name}
        install(index.model, state)
    if state.biased:
        note_old_biases(index)
    _keep_off_fast_path(index)
    state.whole.add(index.model)
    return state


def _freeze(built: NewAdapter, state: AdapterState) -> None:
    for module in state.members():
        module.set_trained(built.name, False)
    for module, originals in built.extras.biases:
        for leaf in originals:
            module._parameters[leaf].requires_grad_(False)  # type: ignore[union-attr]


def _new_state(index: AdapterIndex, name: str) -> AdapterState:
    """Return the state for a model's first adapter, with the base frozen."""
    state = AdapterState()
    state.held = disable_repacking(index.everything.values())
    held = (p for module in index.everything.values() for p in module._parameters.values() if p is not None)
    state.frozen = [(p, p.requires_grad) for p in {id(p): p for p in held}.values()]
    for parameter, _ in state.frozen:
        parameter.requires_grad_(False)
    state.default = Route((name,))
    return state


def _maker(place: TargetWeight, state: AdapterState) -> Callable[[nn.Module], LoraLayer]:
    made = layer_class(place.kind)
    return lambda module: made(module, place.kind, place.slot, state)


def _put_copies(index: AdapterIndex, built: NewAdapter, state: AdapterState) -> None:
    for path, duplicate in built.extras.copies.items():
        holder = index.modules[path]
        if not isinstance(holder, ModulesToSave):
            holder = ModulesToSave(holder, state)
            index.replace(index.modules[path], holder)
        holder.modules_to_save[built.name] = duplicate


def _put_rows(index: AdapterIndex, name: str, chosen: ChosenRows, rows: nn.Parameter, state: AdapterState) -> None:
    leader = _table(index, chosen.path, state, None)
    for path in chosen.tied:
        _table(index, path, state, leader)
    leader.put(name, chosen.indices, rows)


def _table(index: AdapterIndex, path: str, state: AdapterState, leader: TrainableTokens | None) -> TrainableTokens:
    standing = index.modules[path]
    if not isinstance(standing, TrainableTokens):
        made = TrainableTokens(standing, state, leader)
        index.replace(standing, made)
        index.modules[path] = standing = made
    return standing


def note_old_biases(index: AdapterIndex) -> None:
    """Let each adapted layer know which adapter trains the bias of its base, and what it was before.

    Args:
        index: The model's index.
    """
    for _, layer in index.layers():
        found = [(s.adapter, s.originals["bias"]) for s in BiasPatch.on(layer.owner) if "bias" in s.originals]
        layer.old_bias = found[0] if found else None


def _keep_off_fast_path(index: AdapterIndex) -> None:
    """Make every nn.TransformerEncoderLayer that holds adapted layers call them.

    Torch's fast path reads weights without calling their modules, unless a child has a hook: one that does nothing.
    """
    for encoder in (index.model, *index.modules.values()):
        if isinstance(encoder, nn.TransformerEncoderLayer):
            for _, layer in walk(encoder):
                if isinstance(layer, LoraLayer) and _nothing not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: a hook, and a function of this module so that adapted models can be pickled."""
