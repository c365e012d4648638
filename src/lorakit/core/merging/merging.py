"""Merge adapters into the base weights, and unmerge them bit for bit.

A merge computes W₀ + Σ update in fp32 or wider from the base as it was, and writes it once in the base's dtype. The
original weight is kept (on its device or in main memory) unless the caller gives it up, so several merges can be
undone in any order. What a low-precision base loses is measured and reported.

Every component stages its change before the first one commits, so that a call that raises has changed nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.core.layers.adapter_component import (
    KeepBase,
    MergeOptions,
    SiteMerge,
    StagedMerge,
)
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.merging.checks import check_mergeable, components_apart, leading_tables, names_to_merge
from lorakit.core.model.base_view import float_dtype
from lorakit.core.model.checks import check_known, trainable_block
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.ties import leaders_of
from lorakit.core.quantization import allow_repacking
from lorakit.core.routing.positions import uninstall
from lorakit.errors import MergeError

__all__ = ["KeepBase", "MergeReport", "SiteMerge", "merge", "merge_and_unload", "unmerge", "unmerge_components"]

Flags = list[tuple[LoraLayer | TrainableTokens, set[str]]]
"""Layers and tables, each with the names of the base's parameters there that were trained before adapters."""


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        names: The adapters merged by this call.
        sites: What each site retained.
        kept_bytes: Memory of the kept originals.
    """

    names: tuple[str, ...]
    sites: tuple[SiteMerge, ...]
    kept_bytes: int

    @property
    def retained(self) -> float:
        """The mean fraction of the delta in the stored weights, 0 to 1; 1 if there was nothing to merge."""
        return sum(site.retained for site in self.sites) / len(self.sites) if self.sites else 1.0

    @property
    def error(self) -> float:
        """The mean relative error of the stored weights: a rounding of a plain base, far more of a quantized one."""
        return sum(site.error for site in self.sites) / len(self.sites) if self.sites else 0.0


def merge(
    model: nn.Module, *names: str, keep_base: KeepBase = True, untie: bool = False, dense: bool = False
) -> MergeReport:
    """Merge adapters into the base weights; until they are unmerged, they belong to the default route.

    Args:
        model: An adapted model, changed in place.
        names: Adapters; none means those of the default route.
        keep_base: Keep each original weight on its device (True), in main memory ("cpu"), or not (False: this
            cannot be undone).
        untie: Give a site that shares its weight with another module (tied embeddings) a weight of its own.
        dense: Replace a convolution of several groups, which has no place for its delta, and a quantized module by a
            plain one, instead of quantizing the merged weight, which loses most of a small delta; the dtype is that of
            the quantized module's matmuls.

    Returns:
        How much of the delta is retained, what was lost, and the memory of the kept originals.

    Raises:
        MergeError: Already merged, not mergeable, a weight is shared, or the result is not finite.
        AdapterError: There is no such adapter.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        options = MergeOptions(keep_base, dense=float_dtype(index) if dense else None)
        return _merge(index, names, untie, options)


def _merge(index: AdapterIndex, names: Sequence[str], untie: bool, options: MergeOptions) -> MergeReport:
    chosen = names_to_merge(index, names)
    check_mergeable(index, chosen, untie, options)
    options = dataclasses.replace(options, apart=components_apart(index, chosen, untie))
    led = {} if untie else leaders_of(index, chosen)
    staged = [
        staged
        for path, one in index.with_biases()
        if one not in led and (staged := one.stage_merge(path, chosen, options)) is not None
    ]
    _commit(index, staged, led, options.apart)
    index.known_state().join_default(chosen)
    reports = tuple(change.report for change in staged if change.report is not None)
    return MergeReport(chosen, reports, sum(module.kept_bytes() for module in index.components.values()))


def _commit(
    index: AdapterIndex, staged: Sequence[StagedMerge], led: dict[LoraLayer, LoraLayer], apart: frozenset[int]
) -> None:
    """Make staged changes, then let what shares a weight with a changed component follow it."""
    for one in staged:
        one.commit()
    for layer, leader in led.items():
        layer.follow(leader)
    for table, followers in leading_tables(index).items():
        for follower in followers:
            follower.follow(table, id(table) in apart)


def unmerge(model: nn.Module, *names: str) -> None:
    """Unmerge adapters; with the last of them the base weights are restored bit for bit.

    Args:
        model: An adapted model, changed in place.
        names: Adapters; none means all that are merged.

    Raises:
        MergeError: One of them is not merged, or the base's bits were not kept.
        AdapterError: There is no such adapter.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        unmerge_components(index, names)


def unmerge_components(index: AdapterIndex, names: Sequence[str]) -> None:
    """Unmerge adapters, as `unmerge`, over the index of a call.

    Args:
        index: The model's index; the model is changed in place.
        names: Adapters; none means all that are merged.

    Raises:
        MergeError: As `unmerge`.
        AdapterError: There is no such adapter.
    """
    state, merged = index.known_state(), index.merged_adapters()
    chosen = names or tuple(merged)
    check_known(state, chosen)
    for name in chosen:
        if name not in merged:
            text = f"Adapter {name!r} is not merged. Merged here: {', '.join(merged) or 'none'}."
            raise MergeError(text, what=name, allowed=merged)
    for path, module in index.components.items():
        module.check_unmerge(path, chosen)
    led = leaders_of(index, chosen)
    changes = (one.stage_unmerge(chosen) for _, one in index.with_biases() if one not in led)
    _commit(index, [change for change in changes if change is not None], led, frozenset())
    state.leave_default(chosen)


def merge_and_unload(model: nn.Module, *names: str, untie: bool = False, dense: bool = False) -> MergeReport:
    """Merge adapters permanently and remove all layers, hooks and copies; originals are not kept.

    Args:
        model: An adapted model, changed in place into a plain one.
        names: Adapters to merge; none means those of the default route. Others are dropped.
        untie: As `merge`.
        dense: As `merge`; quantized modules without an adapter stay quantized.

    Returns:
        How much of the deltas is retained.

    Raises:
        MergeError: As `merge`.
        AdapterError: There is no such adapter.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        options = MergeOptions(False, False, float_dtype(index) if dense else None)
        flags = _trained_before(index)
        report = _merge(index, names, untie, options)
        _unload(index, report.names, flags)
    return report


def _unload(index: AdapterIndex, merged: Sequence[str], flags: Flags) -> None:
    """Replace every adapted module by the plain one, and give the base its flags back."""
    state = index.known_state()
    plain = {module: module.unload() for module in index.components.values()}
    for module, left in plain.items():
        index.replace(module, left)
    for patch in (patch for patches in index.patches.values() for patch in patches):
        if patch.adapter not in merged:
            patch.remove(patch.adapter)
        patch.unload()
    if state.waiting:
        uninstall(index.model)
    for parameter, trained in state.frozen:
        parameter.requires_grad_(trained)
    for module, names in flags:
        for name, own in plain[module]._parameters.items():
            if name in names and own is not None:
                own.requires_grad_(True)
    allow_repacking(state.held)
    if state.replication is not None:
        state.replication.untie()


def _trained_before(index: AdapterIndex) -> Flags:
    """The layers and tables, each with the names of the base's parameters that were trained before adapters."""
    trained = {id(parameter) for parameter, flag in index.known_state().frozen if flag}
    flags: Flags = []
    for _, layer in index.layers():
        held = {**layer.source._parameters}
        if layer.tied_weight is not None:
            held[layer.slot.parameter] = layer.tied_weight
        flags.append((layer, {name for name, parameter in held.items() if id(parameter) in trained}))
    for _, table in index.every(TrainableTokens):
        held = dict(table.original_module._parameters)
        for shared in table.token_adapter.tied_weight:
            held["weight"] = shared
        flags.append((table, {name for name, parameter in held.items() if id(parameter) in trained}))
    return flags
