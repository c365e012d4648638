"""Build an adapter (factors, saved modules, token embeddings and biases) outside a model, and then attach it.

`attach` and `load_adapter` share this builder: `attach` takes the factors of each site from an initialization method,
and `load_adapter` takes them from a file. Only `commit` changes a model, and `commit` cannot fail.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.residual_base import SiteStart, in_stored_form, init_context_for, initialized
from lorakit.core.factor import make_dropout
from lorakit.core.inits import InitContext, discard_first_draws, init_for
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import Extras, ModulesToSave, build_extras
from lorakit.core.layers.named_layers import layer_class
from lorakit.core.layers.trainable_tokens import ChosenRows, TrainableTokens
from lorakit.core.model.base_view import freeze_base
from lorakit.core.model.checks import check_can_move, check_not_compiled, check_site, check_together
from lorakit.core.model.fingerprint import record_base
from lorakit.core.model.index import AdapterIndex, TargetWeight, walk
from lorakit.core.model.target_weights import dropout_at, targets_of
from lorakit.core.model.ties import tie_copies, tie_factors
from lorakit.core.quantization import Stored, weight_format_of
from lorakit.core.routing.positions import install
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.core.statistics.moments import Statistics
from lorakit.core.variants import Factor, Start, Variant, variant_for, variants_of
from lorakit.targets.resolving import Match


@dataclass(frozen=True)
class NewFactor:
    """The factors of one site, built but not yet attached.

    Attributes:
        factor: The site's A, B and extra tensors as parameters, together with the scale and dropout.
        trains: Which of "A" and "B" are trainable.
        stored: The residual base in the base module's storage format, or None if the base is unchanged.
        initial: A (r, in) and B (out, r) before training if the residual base is W − s·B·A, otherwise None.
    """

    target: TargetWeight
    factor: Factor
    match: Match
    trains: frozenset[str]
    stored: Stored | None = None
    initial: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class NewAdapter:
    """An adapter, built but not yet attached.

    Attributes:
        config: The adapter's config; the model keeps this object.
        factors: The factors, with one entry per site.
        auxiliary: Saved modules, token embeddings and biases, which are trained together with the factors.
        bias_values: Base biases that the adapter trains, each with its new values (out,).
        trainable: Whether the adapter is trainable; parameters that its initialization freezes always stay frozen.
    """

    name: str
    config: LoraConfig
    factors: Sequence[NewFactor]
    auxiliary: Extras
    bias_values: Sequence[tuple[nn.Parameter, Tensor]] = ()
    trainable: bool = True


def fresh_factors(
    index: AdapterIndex, config: LoraConfig, matches: Sequence[Match], seed: int | None, statistics: Statistics | None
) -> list[NewFactor]:
    """Build initialized factors for every site that a config names, drawing random numbers in site order."""
    generators = _generators(seed)
    factors = []
    for match, target in targets_of(index, matches):
        seen = None if statistics is None else statistics.sites.get(target.path)
        usual = statistics is not None and seen is None and statistics.others_usual
        site_config = config.with_fields(init_lora_weights=True) if usual else config
        factors.append(fresh_factor(index, site_config, match, target, generators, seen))
    return factors


def fresh_factor(
    index: AdapterIndex,
    config: LoraConfig,
    match: Match,
    target: TargetWeight,
    generators: Callable[[torch.device], torch.Generator | None],
    statistics: Mapping[str, Tensor] | None,
) -> NewFactor:
    """Build initialized factors for one site."""
    check_site(index, config, target)
    context = init_context_for(index, config, match, target, generators, statistics)
    init = init_for(config.init_lora_weights, target.kind, target.path)
    variant, _ = variant_for(config, target.kind, target.path)
    if init.changes_base:
        check_can_move(index, target, init)
    check_together(init, variant, target)
    if init.draws_again:
        discard_first_draws(context)
    start = initialized(index, target, init, context)
    return new_factor(index, target, match, context, start, init.trains)


def new_factor(
    index: AdapterIndex,
    target: TargetWeight,
    match: Match,
    context: InitContext,
    start: SiteStart,
    trains: frozenset[str],
) -> NewFactor:
    """Build a site's factors from their initial tensors, without changing the model.

    Raises:
        ConfigError: The variant or dropout is not supported at the site; or the variant must replace a base weight
            that is quantized, has adapters merged into it, or has already been replaced for another adapter.
    """
    config, module, stored = context.config, index.holder(target), start.stored

    def read() -> Tensor:
        return (
            context.read() if stored is None else weight_format_of(module, target.spec.parameter).read(module, stored)
        )

    variant, setting = variant_for(config, target.kind, target.path)
    new = Start(
        target.kind, target.spec, start.A, start.B, context.scale, read, target.path, setting, context.generator
    )
    moved, trains = _moved_by(variant, index, target, new), trains & variant.parts.trains
    stored = stored if moved is None else moved
    A, B, own = start.A, start.B, start.own
    if own is None:  # a new adapter
        A, B = variant.parts.factors(new)
        own = _extras(variant, dataclasses.replace(new, A=A, B=B), config)
    factor = Factor(
        A=nn.Parameter(A, "A" in trains),
        B=nn.Parameter(B, "B" in trains),
        scale=context.scale,
        dropout=make_dropout(dropout_at(config, target, module)),
        variant=variant,
        own={t.held_as: nn.Parameter(own[t.held_as], t.trained) for t in variant.parts.extras},
        bias=None if start.bias is None else nn.Parameter(start.bias),
        setting=setting,
    )
    return NewFactor(target, factor, match, trains, stored, start.initial)


def _extras(variant: Variant, new: Start, config: LoraConfig) -> Mapping[str, Tensor]:
    """Return a variant's initial extra tensors (…), computed on a GPU if there is one and the config offloads."""
    here = new.A.device
    wanted = config.runtime_config.ephemeral_gpu_offload and here.type == "cpu" and new.generator is None
    if not wanted or not torch.cuda.is_available():
        return variant.parts.extra_tensors(new)
    A, B = new.A.to("cuda"), new.B.to("cuda")
    there = dataclasses.replace(new, A=A, B=B, read=lambda: new.read().to("cuda"))
    return {name: tensor.to(here) for name, tensor in variant.parts.extra_tensors(there).items()}


def _moved_by(variant: Variant, index: AdapterIndex, target: TargetWeight, start: Start) -> Stored | None:
    """Return the modified base weight that a variant requires, or None if the variant uses the original weight.

    Adapters with the same variant and rank share the modified weight.
    """
    if variant.move is None:
        return None
    layer = index.layer(target)
    if layer is not None and layer.moved is not None:
        first = layer.moved_by[0]
        if layer.factor(first).variant is variant and layer.r[first] == start.rank:
            return layer.moved
    check_can_move(index, target, variant=variant)
    with torch.no_grad():
        return in_stored_form(index, target, variant.move.weight(start))


def _generators(seed: int | None) -> Callable[[torch.device], torch.Generator | None]:
    """Return a function that maps a device to a generator with the given seed, or to None if `seed` is None."""

    @functools.cache
    def for_device(device: torch.device) -> torch.Generator | None:
        return None if seed is None or device.type == "meta" else torch.Generator(device).manual_seed(seed)

    return for_device


def new_extras(
    index: AdapterIndex,
    config: LoraConfig,
    factors: Sequence[NewFactor],
    saved: Sequence[str],
    tied: Mapping[str, str],
    rows: Sequence[tuple[ChosenRows, nn.Parameter]],
) -> Extras:
    """Build the parameters that an adapter trains besides its factors: saved modules, token embeddings and biases.

    Args:
        index: The model's index.
        config: The adapter's config.
        factors: The adapter's factors.
        saved: Paths of the adapter's saved modules.
        tied: Path of a tied module -> path of the module whose weight it shares.
        rows: The adapter's token embeddings, as returned by `new_rows`.

    Raises:
        TargetError: A saved module contains sites of another adapter or modules that another adapter saves.
        ConfigError: A bias cannot be trained.
    """
    for path in (*saved, *(path for chosen, _ in rows for path in (chosen.path, *chosen.tied))):
        check_not_compiled(index, path)
    auxiliary = build_extras(index.modules, {factor.target.outer for factor in factors}, saved, config.bias)
    tie_copies(auxiliary.copies, tied)
    return dataclasses.replace(auxiliary, rows=tuple(rows), leaders=tied)


def new_rows(
    index: AdapterIndex, chosen: Sequence[ChosenRows], given: Mapping[str, Tensor] | None = None
) -> list[tuple[ChosenRows, nn.Parameter]]:
    """Build an adapter's token embeddings, in fp32 or wider on the device of their embedding.

    `given` maps the path of an embedding to the adapter's rows (n, d); None is for a new adapter, which starts with
    those of the base. Return the tokens selected in each embedding, with their rows.
    """
    new = []
    for part in chosen:
        component = index.modules[part.path]
        table: Tensor = index.base(part.path).get_parameter("weight")
        if isinstance(component, TrainableTokens):
            table = component.token_adapter.original()
        if given is None:
            rows = table.detach()[torch.tensor(part.indices, device=table.device)]
        else:
            rows = given[part.path].to(table.device)
        wide = torch.promote_types(table.dtype, torch.float32)
        new.append((part, nn.Parameter(rows.to(wide, copy=True))))
    return new


def commit(index: AdapterIndex, built: NewAdapter) -> AdapterState:
    """Attach an adapter that has already been built, given an up-to-date index; this step cannot fail."""
    name = built.name
    state = index.state or AdapterState()
    if index.state is None:
        freeze_base(index)
        state.default = Route((name,))
    record_base(index, state)
    index.state = state
    state.configs[name] = built.config
    state.kinds = index.kinds
    for new in built.factors:
        target = new.target
        make = functools.partial(layer_class(target.kind), kind=target.kind, spec=target.spec, state=state)
        layer = index.layer(target) or index.put(target, make)
        layer.put(name, new.factor, new.match.rank, new.match.alpha, new.trains)
        if new.stored is not None:
            layer.move_base(name, new.stored, new.initial)
    _put_extras(index, built, state)
    for module in () if built.trainable else state.members():
        module.set_trained(name, False)
    if any(variant.invocation is not None for variant in variants_of(built.config)):
        state.waiting |= {name}
        install(index.model, state)
    if state.biased:
        note_old_biases(index)
    _keep_off_fast_path(index)
    index.note_places()
    state.whole.add(index.model)
    return state


def _put_extras(index: AdapterIndex, built: NewAdapter, state: AdapterState) -> None:
    name, auxiliary = built.name, built.auxiliary
    for path, duplicate in auxiliary.copies.items():
        holder = index.modules[path]
        if not isinstance(holder, ModulesToSave):
            holder = ModulesToSave(holder, state)
            index.replace(index.modules[path], holder)
            index.components[path] = holder
        holder.modules_to_save[name] = duplicate
    tie_factors(index, name, auxiliary.leaders)
    for chosen, rows in auxiliary.rows:
        leader = _table(index, chosen.path, state)
        for path in chosen.tied:
            _table(index, path, state, leader)
        leader.put(name, chosen.indices, rows)
    for module, originals in auxiliary.biases:
        BiasPatch.install(name, originals, module, state, built.trainable)
    for parameter, values in built.bias_values:
        parameter.data = values


def _table(
    index: AdapterIndex, path: str, state: AdapterState, leader: TrainableTokens | None = None
) -> TrainableTokens:
    component = index.modules[path]
    if not isinstance(component, TrainableTokens):
        new = TrainableTokens(component, state, leader)
        index.replace(component, new)
        index.modules[path] = index.components[path] = component = new
    return component


def note_old_biases(index: AdapterIndex) -> None:
    """Record, in each adapted layer, the base layer's original bias and the name of the adapter that trains it."""
    for _, layer in index.layers():
        trained = [(s.adapter, s.originals["bias"]) for s in BiasPatch.on(layer.owner) if "bias" in s.originals]
        layer.old_bias = trained[0] if trained else None


def _keep_off_fast_path(index: AdapterIndex) -> None:
    """Keep every nn.TransformerEncoderLayer that contains adapted layers off PyTorch's fast path.

    The fast path reads weights without calling their modules, unless a child has a hook, so each adapted layer gets a
    hook that does nothing.
    """
    for encoder in (index.model, *index.modules.values()):
        if isinstance(encoder, nn.TransformerEncoderLayer):
            for _, layer in walk(encoder):
                if isinstance(layer, LoraLayer) and _nothing not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Do nothing; this hook is a module-level function so that adapted models can be pickled."""
