"""Torch's fast path of nn.TransformerEncoderLayer reads weights without calling their modules: adapters would not act.

Torch leaves that path alone where a child has a hook. One that does nothing is hung on the adapted children of such
layers; it goes with them.

Factors built off the model: what an init is given at a site, and what becomes of it.

Nothing here changes a model. What is built is put in place by `attaching`, in one step.

What a fresh adapter trains beside its factors, built off the model: copies, rows, biases, and their ties.

Trained rows of tables, built off a model and put in place: fresh ones, and those of a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig, scale
from lorakit.core.attachment.residual_base import UNMOVED, Cost, check_can_move, cost_of, moved_base, written
from lorakit.core.factor import Factor, factor_dtype, make_dropout
from lorakit.core.inits import Blank, fresh_bias, init_for
from lorakit.core.inits.init import BOTH
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import Extras, build_extras
from lorakit.core.layers.trainable_tokens import ChosenRows, NewRows, TrainableTokens
from lorakit.core.model.index import Place, SiteMap
from lorakit.core.model.target_weights import dropout_at, places_of
from lorakit.core.model.ties import Ties, tie_copies
from lorakit.core.model.token_indices import chosen_rows
from lorakit.core.quantization import base_of
from lorakit.core.routing.state import AdapterState
from lorakit.core.statistics.stored import Statistics
from lorakit.core.variants import variant_for
from lorakit.errors import ConfigError
from lorakit.tables import format_bytes
from lorakit.targets import Match, Note


def keep_off(modules: Iterable[nn.Module]) -> None:
    """Make every nn.TransformerEncoderLayer that holds adapted layers call them.

    Args:
        modules: The modules of a model.
    """
    for encoder in modules:
        if not isinstance(encoder, nn.TransformerEncoderLayer):
            continue
        for layer in encoder.modules():
            if isinstance(layer, LoraLayer) and _nothing not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook; it is a function of this module so that adapted models can be pickled."""


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
        initial: A (r, in) and B (out, r) as they were when the base became W − s·B·A, or None.
        cost: What moving the base costs.
    """

    place: Place
    factor: Factor
    r: int
    lora_alpha: float
    moved: Any = None
    trains: frozenset[str] = BOTH
    initial: tuple[Tensor, Tensor] | None = None
    cost: Cost = UNMOVED


def fresh_parts(
    site_map: SiteMap, config: LoraConfig, matches: Sequence[Match], seed: int | None, statistics: Statistics | None
) -> list[Part]:
    """Fresh factors for every site that a config names.

    Args:
        site_map: The model's map.
        config: The adapter's config.
        matches: The sites, with rank and alpha.
        seed: Seed, or None for torch's own generator.
        statistics: What was made of the data, or None.

    Raises:
        ConfigError: The init or the variant does not fit a site.
    """
    generators = _generators(seed)
    parts = []
    for match, place in places_of(site_map, matches):
        seen = None if statistics is None else statistics.sites.get(place.path)
        usual = statistics is not None and seen is None and statistics.others_usual
        asked = config.with_fields(init_lora_weights=True) if usual else config
        blank = blank_for(site_map, asked, match, place, generators, seen)
        parts.append(_fresh_part(site_map, blank, match, place))
    return parts


def blank_for(
    site_map: SiteMap,
    config: LoraConfig,
    match: Match,
    place: Place,
    generators: Callable[[torch.device], torch.Generator | None] = lambda _: None,
    statistics: Mapping[str, Tensor] | None = None,
) -> Blank:
    """What an init is given for a site.

    Args:
        site_map: The model's map.
        config: The adapter's config.
        match: The target match that names the site.
        place: Where.
        generators: Source of randomness by device.
        statistics: What was made of the data for this site, name -> tensor (…), or None.
    """
    module, parameter = site_map.holder(place), place.slot.parameter
    device = base_of(module, parameter).device(module, parameter)
    return Blank(
        kind=place.kind,
        slot=place.slot,
        r=match.rank,
        scale=scale(match.rank, match.alpha, config.use_rslora),
        shapes=place.kind.shapes(place.slot, match.rank),
        device=device,
        dtype=factor_dtype(module, parameter),
        path=place.path,
        read=lambda: site_map.weight(place),
        config=config,
        generator=generators(device),
        statistics=statistics,
    )


def _fresh_part(site_map: SiteMap, blank: Blank, match: Match, place: Place) -> Part:
    config, kind, slot = blank.config, place.kind, place.slot
    check_bias_of_b(config, place)
    check_storage(site_map, place)
    init = init_for(config.init_lora_weights, kind.name, place.path)
    variant = variant_for(config, kind.name, place.path)
    if init.changes_base:
        check_can_move(site_map, place, init)
        if not variant.mergeable:
            raise ConfigError(
                f"{place.path}: init_lora_weights={config.init_lora_weights!r} moves the base weight, and "
                f"{variant.name} needs the base as it is before its start. Use another init.",
                where=place.path,
            )
    with torch.no_grad():
        filled = init.fill(blank)
    initial = (filled.A, filled.B) if init.changes_base and filled.W is None else None
    moved = None
    if initial is not None:
        moved = moved_base(site_map, place, initial, blank.scale)
    elif filled.W is not None:
        moved = written(site_map, place, filled.W)
    magnitude = None
    if variant.has_magnitude:
        module = site_map.holder(place)
        W = blank.read() if moved is None else base_of(module, slot.parameter).read(module, moved)
        magnitude = variant.magnitude(kind, slot, W, filled.A, filled.B, blank.scale).view(kind.vector(slot))
    dropout = make_dropout(dropout_at(config, place, site_map.holder(place)))
    bias = fresh_bias(blank, not init.is_identity) if config.lora_bias else None
    factor = Factor(filled.A, filled.B, blank.scale, dropout, variant.name, magnitude, bias)
    factor = as_parameters(factor, trains=init.trains)
    cost = UNMOVED if moved is None else cost_of(site_map, place, moved, initial, blank.scale)
    return Part(place, factor, match.rank, match.alpha, moved, init.trains, initial, cost)


def notes_on_moving(config: LoraConfig, parts: Sequence[Part]) -> list[Note]:
    """Return notes on what a moved base costs; none if nothing was moved."""
    costs = [part.cost for part in parts if part.moved is not None]
    if not costs:
        return []
    text = (
        f"{config.init_lora_weights} moves the base's weight at {len(costs)} sites; the originals and the first "
        f"factors are kept beside it, {format_bytes(sum(cost.kept_bytes for cost in costs))}, so that the base can be "
        "had back."
    )
    notes = [Note("residual_base", text)]
    lost = max(cost.lost for cost in costs)
    if lost:
        text = (
            f"The base is stored in fewer bits, and what {config.init_lora_weights} left of it was rounded a second "
            f"time, by up to {lost:.2g} of a weight: a fresh adapter is off by as much, and it is no plain LoRA."
        )
        notes.append(Note("rounded_base", text))
    return notes


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
    return Factor(A, B, factor.scale, factor.dropout, factor.variant, vector, bias)


def check_storage(site_map: SiteMap, place: Place) -> None:
    """Refuse to act on a weight that would be rounded to few bits in each forward, and pass no gradient.

    Raises:
        ConfigError: The message names the site and its storage.
    """
    base = base_of(site_map.holder(place), place.slot.parameter)
    if place.kind.acts_on == "weight" and base.quantised:
        raise ConfigError(
            f"{place.path} is stored as {base.name}, and a {place.kind.name} is adapted by its weight, which would be "
            "rounded with its update in each forward. Name a dense layer in target_modules, where the adapter acts "
            "beside the weight, or leave it out.",
            where=place.path,
            field="target_modules",
        )


def check_bias_of_b(config: LoraConfig, place: Place) -> None:
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


def fresh_extras(model: nn.Module, site_map: SiteMap, config: LoraConfig, outer: Collection[str], ties: Ties) -> Extras:
    """Make a fresh adapter's extras.

    Args:
        model: The model.
        site_map: Its map.
        config: The config.
        outer: Paths of the modules that get factors.
        ties: What the config names, and what is tied to it.

    Raises:
        TargetError: Another part of an adapter is in the way.
        ConfigError: Rows are named that cannot be trained.
    """
    saved = ties.found.saved
    rows = new_rows(site_map, chosen_rows(model, site_map, config, outer, saved))
    extras = build_extras(site_map.modules, outer, saved, config.bias)
    tie_copies(extras.copies, ties.leaders)
    return dataclasses.replace(extras, rows=tuple(rows), leaders=ties.leaders)


def new_rows(
    site_map: SiteMap, chosen: Sequence[ChosenRows], given: Mapping[str, Tensor] | None = None, trainable: bool = True
) -> list[NewRows]:
    """Make an adapter's rows: as the base has them, so that a fresh adapter changes nothing, or as they are given.

    Args:
        site_map: The model's map.
        chosen: Which.
        given: Path of a table -> its rows, (n, d); None for fresh ones.
        trainable: They require gradients.

    Returns:
        The rows, on their table's device, in fp32 or wider.
    """
    made = []
    for part in chosen:
        standing = site_map.modules[part.path]
        if isinstance(standing, TrainableTokens):
            table = standing.token_adapter.original()
        else:
            table = site_map.base(part.path).weight  # type: ignore[assignment]
        if given is None:
            rows = table.detach()[torch.tensor(part.indices, device=table.device)]
        else:
            rows = given[part.path].to(table.device)
        wide = torch.promote_types(table.dtype, torch.float32)
        made.append(NewRows(part, nn.Parameter(rows.to(wide, copy=True), trainable)))
    return made


def put_rows(site_map: SiteMap, name: str, parts: Sequence[NewRows], state: AdapterState) -> None:
    """Put an adapter's rows in place; nothing here can refuse.

    Args:
        site_map: The model's map.
        name: The adapter.
        parts: Its rows.
        state: The model's state.
    """
    for part in parts:
        leader = _standing(site_map, part.chosen.path, state, None)
        for path in part.chosen.tied:
            _standing(site_map, path, state, leader)
        leader.put(name, part.chosen.indices, part.rows)


def _standing(site_map: SiteMap, path: str, state: AdapterState, leader: TrainableTokens | None) -> TrainableTokens:
    standing = site_map.modules[path]
    if not isinstance(standing, TrainableTokens):
        made = TrainableTokens(standing, state, leader)
        site_map.replace(standing, made)
        site_map.modules[path] = standing = made
    return standing
