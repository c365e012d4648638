"""Merge adapters into the base weight, and take them out again to the very bit.

A merge computes W₀ + Σ update in fp32 or wider from the base as it was, and writes it once in the base's dtype. The
original weight is kept (on its device or in main memory) unless the caller gives it up, so several merges
come out in any order. What a low-precision base could not take in is measured and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.bias import BiasPatch, bias_for, check_replaceable, put_bias
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.merged_weight import (
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
    weight_with,
)
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.merging.checks import check_mergeable, check_unmergeable, sites_apart, tied_sites
from lorakit.core.merging.token_tables import (
    built_rows,
    check_rows,
    kept_row_bytes,
    merge_rows,
    merged_names,
    unmerge_rows,
)
from lorakit.core.model.base_view import float_dtype
from lorakit.core.model.checks import check_known, trainable_tensors
from lorakit.core.model.index import copies, layers, state_of
from lorakit.core.model.ties import of_one_weight
from lorakit.core.quantization import let_go
from lorakit.core.routing.positions import uninstall
from lorakit.errors import MergeError

__all__ = [
    "KeepBase",
    "MergeReport",
    "SiteMerge",
    "check_unmergeable",
    "merge",
    "merge_and_unload",
    "merged_adapters",
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
    def retained(self) -> float:
        """The mean share of the delta that was taken in, 0 to 1; 1 where there was nothing to merge."""
        return sum(site.retained for site in self.sites) / len(self.sites) if self.sites else 1.0

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
        How much of the delta is retained, what was lost, and what the kept originals cost.

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
            text = f"Adapter {name!r} is not merged. Merged here: {', '.join(sorted(merged)) or 'none'}."
            raise MergeError(text, what=name, allowed=sorted(merged))
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
        How much of the delta is retained.

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
            if isinstance(child, AdapterModule):
                module._modules[attribute] = _plain(child)
    dropped = set(state.configs) - set(report.names)
    for module in model.modules():
        BiasPatch.uninstall(module, dropped)
        BiasPatch.forget(module)
    uninstall(model)
    for parameter, trained in state.frozen:
        parameter.requires_grad_(trained)
    _give_flags(flags)
    let_go(state.held)
    if state.replication is not None:
        state.replication.untie()
    return report


def _flags(model: nn.Module) -> list[tuple[LoraLayer | TrainableTokens, set[str]]]:
    """The layers and tables, each with the names of the base's parameters there that were trained before adapters."""
    trained = {id(parameter) for parameter, flag in state_of(model).frozen if flag}
    found: list[tuple[LoraLayer | TrainableTokens, set[str]]] = []
    for _, layer in layers(model):
        held = {**layer.source._parameters}
        if layer.tied_weight is not None:
            held[layer.slot.parameter] = layer.tied_weight
        found.append((layer, {name for name, parameter in held.items() if id(parameter) in trained}))
    for module in model.modules():
        if isinstance(module, TrainableTokens):
            held = dict(module.original_module._parameters)
            for shared in module.token_adapter.tied_weight:
                held["weight"] = shared
            found.append((module, {name for name, parameter in held.items() if id(parameter) in trained}))
    return found


def _give_flags(flags: list[tuple[LoraLayer | TrainableTokens, set[str]]]) -> None:
    """Train again what stands where something was trained."""
    for standing, names in flags:
        owner = standing.owner if isinstance(standing, LoraLayer) else standing.original_module
        for name, parameter in owner._parameters.items():
            if name in names and parameter is not None:
                parameter.requires_grad_(True)


def _plain(standing: AdapterModule) -> nn.Module:
    """What stays of an adapted module when everything is merged."""
    if isinstance(standing, ModulesToSave) and standing.merged_adapter:
        return standing.modules_to_save[standing.merged_adapter]
    return standing.owner if isinstance(standing, LoraLayer) else standing.original_module  # type: ignore[return-value]
