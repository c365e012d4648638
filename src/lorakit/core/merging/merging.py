"""Merge adapters into the base weight, and take them out again to the very bit.

A merge computes W₀ + Σ update in fp32 or wider from the base as it was, and writes it once in the base's dtype. The
original weight is kept (on its device or in main memory) unless the caller gives it up, so several merges
come out in any order. What a low-precision base could not take in is measured and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.bases import let_go
from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.sitemap import copies, layers, state_of
from lorakit.core.layering.underlying import (
    QuantisedWeight,
    base_tensors,
    float_dtype,
    quantised_weights,
)
from lorakit.core.making.checks import check_known
from lorakit.core.making.inference import trainable_tensors
from lorakit.core.merging.biases import bias_for, brings_bias, check_replaceable, put_bias
from lorakit.core.merging.checks import check_mergeable, check_unmergeable, check_variants, sites_apart, tied_sites
from lorakit.core.merging.merged_weight import (
    How,
    KeepBase,
    SiteMerge,
    built,
    give_back,
    kept_bytes,
    merged_weight,
    place,
    put,
    stored_for,
    sum_of_updates,
    weight_with,
)
from lorakit.core.merging.rows import (
    built_rows,
    check_rows,
    kept_row_bytes,
    merge_rows,
    merged_names,
    merged_tables,
    unmerge_rows,
)
from lorakit.core.parts.bias_switch import BiasSwitch
from lorakit.core.parts.extras import ModuleCopies
from lorakit.core.parts.ties import of_one_weight
from lorakit.core.parts.token_rows import TokenRows
from lorakit.core.routes.invoking import uninstall
from lorakit.core.routes.switching import Switched
from lorakit.errors import MergeError

__all__ = [
    "KeepBase",
    "MergeReport",
    "SiteMerge",
    "check_unmergeable",
    "iter_merged",
    "merge",
    "merge_and_unload",
    "merged_adapters",
    "merged_state_dict",
    "stored_for",
    "tied_sites",
    "unmerge",
]


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        names: The adapters merged by this call.
        sites: How each site took it.
        kept_bytes: Memory that the kept originals take.
    """

    names: tuple[str, ...]
    sites: tuple[SiteMerge, ...]
    kept_bytes: int

    @property
    def survived(self) -> float:
        """The mean share of the delta that was taken in, 0 to 1; 1 where there was nothing to merge."""
        return sum(site.survived for site in self.sites) / len(self.sites) if self.sites else 1.0

    @property
    def error(self) -> float:
        """The mean error of the weights written: a rounding of a plain base, of a quantised one far more."""
        return sum(site.error for site in self.sites) / len(self.sites) if self.sites else 0.0


@trainable_tensors
def merge(
    model: nn.Module, *names: str, keep_base: KeepBase = True, untie: bool = False, dense: bool = False
) -> MergeReport:
    """Write adapters into the base weights; from then on they belong to the default route, until they are unmerged.

    Args:
        model: An adapted model, changed in place.
        names: Adapters; none means those of the default route.
        keep_base: Keep each original weight on its device (True), in main memory ("cpu"), or not (False: this
            cannot be undone).
        untie: Give a site that shares its weight with another module (tied embeddings) a weight of its own.
        dense: Put a plain module in the place of a convolution of several groups, which has no place for its delta,
            and of a quantised one, instead of quantising the merged weight, which loses most of a small delta; the
            dtype is that of the quantised one's products.

    Returns:
        How much survived, what was lost, and what the kept originals cost.

    Raises:
        MergeError: Already merged, not mergeable, a weight is shared, or the result is not finite.
        AdapterError: There is no such adapter.
    """
    return _merge(model, names, keep_base, untie, How(dense=float_dtype(model) if dense else None))


def _merge(model: nn.Module, names: Sequence[str], keep_base: KeepBase, untie: bool, how: How) -> MergeReport:
    state = state_of(model)
    chosen = tuple(names or state.default.names)
    check_known(state, chosen)
    check_mergeable(model, chosen, untie)
    check_rows(model, chosen, untie)
    if how.dense is not None:
        check_replaceable(layers(model), chosen, how.in_place)
    here = [(path, layer, [n for n in chosen if n in layer.r]) for path, layer in layers(model)]
    led = [] if untie else of_one_weight(model, chosen)
    here = [(path, layer, new) for path, layer, new in here if new and all(layer is not one for one, _ in led)]
    own = sites_apart(model, untie)
    tables = built_rows(model, chosen, keep=keep_base is not False)
    if keep_base is False:  # two passes instead of a copy: all is known to be sound before the first weight changes
        reports = [merged_weight(path, layer, new, how)[1] for path, layer, new in here]
        for _, layer, new in here:
            bias = bias_for(layer, [*layer.merged_adapters, *new])
            put(layer, built(layer, weight_with(layer, new, how)[0], keep_base, id(layer) in own), new)
            put_bias(layer, bias)
    else:  # whatever takes memory comes before the first change
        ready = []
        reports = []
        for path, layer, new in here:
            stored, report = merged_weight(path, layer, new, how)
            weight = built(layer, stored, keep_base, id(layer) in own)
            ready.append((weight, bias_for(layer, [*layer.merged_adapters, *new])))
            reports.append(report)
        for (_, layer, new), (weight, bias) in zip(here, ready, strict=True):
            put(layer, weight, new)
            put_bias(layer, bias)
    for _, holder in copies(model):
        holder.merged_adapter = next((n for n in chosen if n in holder.modules_to_save), holder.merged_adapter)
    for layer, leader in led:
        layer.kept, layer.merged_adapters = leader.kept, list(leader.merged_adapters)
    merge_rows(tables)
    state.join_default(chosen)
    kept = sum(kept_bytes(layer) for _, layer in layers(model)) + kept_row_bytes(model)
    return MergeReport(chosen, tuple(reports), kept)


def merged_adapters(model: nn.Module) -> set[str]:
    """The adapters that are written into the base somewhere now."""
    merged = {name for _, layer in layers(model) for name in layer.merged_adapters}
    return merged | {h.merged_adapter for _, h in copies(model) if h.merged_adapter} | merged_names(model)


@trainable_tensors
def unmerge(model: nn.Module, *names: str) -> None:
    """Take adapters out of the base weights; with the last of them the very bits are back.

    Args:
        model: An adapted model, changed in place.
        names: Adapters; none means all that are merged.

    Raises:
        MergeError: One of them is not merged, or the base's bits were not kept.
    """
    state = state_of(model)
    merged = merged_adapters(model)
    chosen = names or tuple(merged)
    check_known(state, chosen)
    for name in chosen:
        if name not in merged:
            raise MergeError(f"Adapter {name!r} is not merged. Merged here: {', '.join(sorted(merged)) or 'none'}.")
    check_unmergeable(model, chosen)
    ready = []  # whatever takes memory comes before the first change
    for _, layer in layers(model):
        left = [name for name in layer.merged_adapters if name not in chosen]
        if left != layer.merged_adapters:
            ready.append((layer, left, stored_for(layer, left), bias_for(layer, left)))
    led = {id(layer) for layer, _ in of_one_weight(model, chosen)}
    for layer, left, stored, bias in ready:
        if layer.tied_weight is not None and not left:
            give_back(layer.owner, layer.slot.parameter, layer.tied_weight, stored)
            layer.tied_weight = None
        elif id(layer) not in led:
            place(layer, stored)
        put_bias(layer, bias)
        layer.merged_adapters = left
        if not left:
            layer.kept = layer.kept if layer.moved_by is not None else None
    for _, holder in copies(model):
        holder.merged_adapter = None if holder.merged_adapter in chosen else holder.merged_adapter
    unmerge_rows(model, chosen)
    state.leave_default(chosen)


@trainable_tensors
def merge_and_unload(model: nn.Module, *names: str, untie: bool = False, dense: bool = False) -> MergeReport:
    """Merge adapters for good and take every trace of adapters off the model; nothing is kept, site by site.

    Args:
        model: An adapted model, changed in place into a plain one.
        names: Adapters to merge; none means those of the default route. Others are dropped.
        untie: As `merge`.
        dense: As `merge`; where quantised modules have no adapter, they stay quantised.

    Returns:
        How much of the deltas survived.

    Raises:
        MergeError: As `merge`.
        AdapterError: There is no such adapter.
    """
    state = state_of(model)
    flags = _flags(model)
    report = _merge(model, names, False, untie, How(False, float_dtype(model) if dense else None))
    for _, layer in layers(model):
        if layer.moved_by is not None and layer.moved_by not in layer.merged_adapters:
            layer.moved_by = None
            place(layer, stored_for(layer, layer.merged_adapters))
    for module in list(model.modules()):
        for attribute, child in list(module._modules.items()):
            if isinstance(child, Switched):
                module._modules[attribute] = _plain(child)
    dropped = set(state.configs) - set(report.names)
    for module in model.modules():
        BiasSwitch.uninstall(module, dropped)
        BiasSwitch.forget(module)
    uninstall(model)
    for parameter, trained in state.frozen:
        parameter.requires_grad_(trained)
    _give_flags(flags)
    let_go(state.held)
    if state.replication is not None:
        state.replication.untie()
    return report


def _flags(model: nn.Module) -> list[tuple[LoraLayer | TokenRows, set[str]]]:
    """The layers and tables, each with the names of the base's parameters there that were trained before adapters."""
    trained = {id(parameter) for parameter, flag in state_of(model).frozen if flag}
    found: list[tuple[LoraLayer | TokenRows, set[str]]] = []
    for _, layer in layers(model):
        held = {**layer.source._parameters}
        if layer.tied_weight is not None:
            held[layer.slot.parameter] = layer.tied_weight
        found.append((layer, {name for name, parameter in held.items() if id(parameter) in trained}))
    for module in model.modules():
        if isinstance(module, TokenRows):
            held = dict(module.original_module._parameters)
            for shared in module.token_adapter.tied_weight:
                held["weight"] = shared
            found.append((module, {name for name, parameter in held.items() if id(parameter) in trained}))
    return found


def _give_flags(flags: list[tuple[LoraLayer | TokenRows, set[str]]]) -> None:
    """Train again what stands where something was trained."""
    for standing, names in flags:
        owner = standing.owner if isinstance(standing, LoraLayer) else standing.original_module
        for name, parameter in owner._parameters.items():
            if name in names and parameter is not None:
                parameter.requires_grad_(True)


def _plain(standing: Switched) -> nn.Module:
    """What stays of an adapted module when everything is merged."""
    if isinstance(standing, ModuleCopies) and standing.merged_adapter:
        return standing.modules_to_save[standing.merged_adapter]
    return standing.owner if isinstance(standing, LoraLayer) else standing.original_module  # type: ignore[return-value]


def merged_state_dict(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """The state dict of the base with adapters merged, under the base's own names; the model is left alone.

    Args:
        model: An adapted model.
        names: Adapters; none means those of the default route.

    Returns:
        Name -> tensor (…) in the base's dtype. Tensors without an adapter are the model's own, not copies. A weight
        that is tied in the model and adapted in one place appears under both names, no longer the same. Quantised
        weights are multiplied out, in the dtype of their products: the state dict is that of the plain base.

    Raises:
        MergeError: An adapter cannot be merged.
        AdapterError: There is no such adapter.
    """
    return dict(iter_merged(model, *names))


def iter_merged(model: nn.Module, *names: str) -> Iterator[tuple[str, Tensor]]:
    """`merged_state_dict`, one tensor at a time.

    Yields:
        Name and tensor (…).

    Raises:
        MergeError: An adapter cannot be merged.
        AdapterError: There is no such adapter.
    """
    state = state_of(model)
    chosen = tuple(names or state.default.names)
    check_known(state, chosen)
    check_variants(model, chosen)
    sites = {(id(layer.source), layer.slot.parameter): layer for _, layer in layers(model)}
    led = {id(layer): leader for layer, leader in of_one_weight(model, chosen)}
    replaced = _copied_tensors(model, chosen)
    biased = {(id(layer.source), "bias"): layer for layer in sites.values() if brings_bias(layer, chosen)}
    quantised = {weight.packed: weight for weight in quantised_weights(model)}
    how = How(False, float_dtype(model)) if quantised else How(False)
    for name, tensor, module in base_tensors(model):
        leaf = name.rpartition(".")[2]
        if name in quantised:
            yield from _multiplied_out(quantised[name], chosen, how, replaced)
            continue
        layer = sites.get((id(module), leaf))
        if layer is not None:
            layer = led.get(id(layer), layer)  # one weight, to the bit
            here = [n for n in chosen if n in layer.r]
            yield name, sum_of_updates(layer, here, How(False))[0] if here else tensor.detach()
        elif (id(module), leaf) in biased:
            layer = biased[id(module), leaf]
            bias = bias_for(layer, [n for n in chosen if n in layer.r])
            yield name, tensor.detach() if bias is None else bias
        elif name in replaced:
            yield name, replaced[name]
        else:
            biases = [s for s in BiasSwitch.on(module) if s.adapter in chosen and leaf in s.originals]
            yield name, (module._parameters[leaf] if biases else tensor).detach()  # type: ignore[union-attr]


def _multiplied_out(
    weight: QuantisedWeight, names: Sequence[str], how: How, replaced: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """A quantised weight with adapters in it as the plain base has it: name and tensor; also a bias of its own."""
    here = [] if weight.layer is None else [name for name in names if name in weight.layer.r]
    bias, of_bias = weight.loose_bias, weight.name.removesuffix("weight") + "bias"
    if weight.name in replaced:  # an adapter's copy of the whole module stands in its place
        yield weight.name, replaced[weight.name]
        bias = replaced.get(of_bias) if bias is not None else None
    elif weight.layer is None or not here:
        yield weight.name, weight.multiplied_out(how.dense or torch.float32)._parameters["weight"].detach()  # type: ignore[union-attr]
    else:
        yield weight.name, sum_of_updates(weight.layer, here, how)[0]._parameters["weight"].detach()
        bias = bias if bias is None or not brings_bias(weight.layer, here) else bias_for(weight.layer, here)
    if bias is not None:
        yield of_bias, bias.detach()


def _copied_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Name in the base -> tensor (…) of the copy that an adapter trained in its place."""
    found: dict[str, Tensor] = {}
    for path, holder in copies(model):
        for name in names:
            if name in holder.modules_to_save:
                for leaf, tensor in holder.modules_to_save[name].state_dict().items():
                    found[f"{path}.{leaf}"] = tensor
    return found | {f"{path}.weight": table for path, table in merged_tables(model, names).items()}
