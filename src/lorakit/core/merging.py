"""Merge adapters into the base weights, and unmerge them bit for bit.

A merge computes W₀ + Σ update in fp32 or wider from the original base, and writes the sum once in the base dtype. The
original weight is kept (on its device or in main memory) unless the caller opts out, so several merges can be undone in
any order. The error of storing the sum in low precision is measured and reported.

Every component stages its change before any change is committed, so a call that raises an error leaves the model
unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.layers.adapter_component import KeepBase, MergeOptions, SiteMerge, StagedMerge
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.base_view import QuantizedWeight, base_tensors, float_dtype, quantized_weights, unfreeze_base
from lorakit.core.model.index import AdapterIndex, trainable_block
from lorakit.core.model.replication import replication_of
from lorakit.core.model.ties import leaders_of, untied_copies
from lorakit.core.routing.positions import uninstall
from lorakit.errors import AdapterError, MergeError


@dataclass(frozen=True)
class MergeReport:
    """Result of `merge`: the merged adapters, the effect at each site, and the size of the kept original weights."""

    names: tuple[str, ...]
    sites: tuple[SiteMerge, ...]
    kept_bytes: int

    @property
    def retained(self) -> float:
        """The mean fraction of the delta that the stored weights retain (0 to 1); 1 if there was nothing to merge."""
        return sum(site.retained for site in self.sites) / len(self.sites) if self.sites else 1.0

    @property
    def error(self) -> float:
        """The mean relative error of the stored weights; it is only a rounding error unless the base is quantized."""
        return sum(site.error for site in self.sites) / len(self.sites) if self.sites else 0.0


def merge(
    model: nn.Module, *names: str, keep_base: KeepBase = True, untie: bool = False, dense: bool = False
) -> MergeReport:
    """Merge adapters into the base weights; merged adapters belong to the default route until they are unmerged.

    Args:
        model: An adapted model, changed in place.
        names: Adapters to merge; if none are given, those in the default route.
        keep_base: Keep each original weight on its device (True) or in main memory ("cpu"), or discard it (False). If
            the original weights are discarded, the merge cannot be undone.
        untie: Whether to give a separate weight to a site that shares its weight with another module (tied embeddings).
        dense: Whether to replace quantized modules and grouped convolutions (whose weights cannot hold the delta) with
            plain modules. Otherwise, the merged weights of quantized modules are requantized, and most of a small delta
            is lost. A module that replaces a quantized one gets the dtype in which the quantized one computed matmuls.

    Raises:
        MergeError: An adapter is already merged or cannot be merged, a weight is shared, or the result is not finite.
        AdapterError: An adapter is not on the model.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        options = MergeOptions(keep_base, dense=float_dtype(index) if dense else None)
        return _merge(index, names, untie, options)


def _merge(index: AdapterIndex, names: Sequence[str], untie: bool, options: MergeOptions) -> MergeReport:
    chosen = names_to_merge(index, names)
    _check_mergeable(index, chosen, untie, options)
    options = dataclasses.replace(options, apart=_components_apart(index, chosen, untie))
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
    """Commit staged changes, then update the components that share a weight with a changed one."""
    for one in staged:
        one.commit()
    for layer, leader in led.items():
        layer.follow(leader)
    for table, followers in _leading_tables(index).items():
        for follower in followers:
            follower.follow(table, id(table) in apart)


def unmerge(model: nn.Module | AdapterIndex, *names: str) -> None:
    """Unmerge adapters, by default all; unmerging the last one restores the base weights bit for bit.

    Raises:
        MergeError: An adapter is not merged, or the original weights were not kept.
        AdapterError: An adapter is not on the model.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        state, merged = index.known_state(), index.merged_adapters()
        chosen = names or tuple(merged)
        state.check(chosen, AdapterError)
        for name in chosen:
            if name not in merged:
                text = f"Adapter {name!r} is not merged; merged adapters: {', '.join(merged) or 'none'}."
                raise MergeError(text, what=name, allowed=merged)
        for path, module in index.components.items():
            module.check_unmerge(path, chosen)
        led = leaders_of(index, chosen)
        changes = (one.stage_unmerge(chosen) for _, one in index.with_biases() if one not in led)
        _commit(index, [change for change in changes if change is not None], led, frozenset())
        state.leave_default(chosen)


def merge_and_unload(model: nn.Module, *names: str, untie: bool = False, dense: bool = False) -> MergeReport:
    """Merge adapters permanently and remove all adapter layers, hooks and copies; original weights are not kept.

    All adapters that are not merged are dropped. The arguments and errors are those of `merge`; with `dense`, quantized
    modules without adapters stay quantized.
    """
    index = AdapterIndex.of(model)
    with trainable_block(index):
        options = MergeOptions(False, False, float_dtype(index) if dense else None)
        sources = {layer: layer.source for _, layer in index.layers()}  # a dense merge replaces some of them
        report = _merge(index, names, untie, options)
        _unload(index, report.names, sources)
    return report


def _unload(index: AdapterIndex, merged: Sequence[str], sources: Mapping[LoraLayer, nn.Module]) -> None:
    """Replace every adapted module with a plain one, and restore the flags of the `sources` before the merge."""
    state = index.known_state()
    plain = {module: module.unload() for module in index.components.values()}
    for module, left in plain.items():
        index.replace(module, left)
    for patch in index.bias_patches():
        if patch.adapter not in merged:
            patch.remove(patch.adapter)
        patch.unload()
    if state.waiting:
        uninstall(index.model)
    unfreeze_base(index, {source: plain[layer] for layer, source in sources.items()})
    replication = replication_of(index)
    if replication is not None:
        replication.untie()


def names_to_merge(index: AdapterIndex, names: Sequence[str]) -> tuple[str, ...]:
    """Return the adapters to merge: those given by name, or those in the default route if none are given."""
    state = index.known_state()
    chosen = tuple(names or state.default.names)
    state.check(chosen, AdapterError)
    index.check_complete(chosen)
    return chosen


def _check_mergeable(index: AdapterIndex, names: Sequence[str], untie: bool, options: MergeOptions) -> None:
    """Check that a merge is possible, without computing anything."""
    if not names:
        text = "No adapter is active, so there is nothing to merge. Specify the adapters to merge."
        raise MergeError(text, field="adapter_names")
    for path, module in index.components.items():
        module.check_merge(path, names, options)
    if untie:
        return
    for path, other in tied_sites(index, names):
        raise _is_shared(path, other, "", ", or do not adapt it")
    leading = _leading_tables(index)
    for path, table in index.every(TrainableTokens):
        here = table in leading and any(name in table for name in names)
        sharing = _shared_table(index, table, leading[table]) if here else None
        if sharing is not None:
            raise _is_shared(path, sharing, ", which does not use its trainable tokens", "")


def _is_shared(path: str, other: str, how: str, otherwise: str) -> MergeError:
    text = (
        f"{path} shares its weight with {other}{how}; a merge would change both. Merge with untie=True to give {path} "
        f"a separate weight (and save with tie_word_embeddings=False){otherwise}."
    )
    return MergeError(text, what=other, where=path, override="untie")


def tied_sites(model: nn.Module | AdapterIndex, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the adapters' sites whose weights are shared, each with the weight's name in another module."""
    index = AdapterIndex.of(model)
    led, sites = leaders_of(index, names), []
    one: dict[int, set[int]] = {}  # id of a layer -> ids of the modules that share its weight
    for _, layer in index.layers():
        one.setdefault(id(led.get(layer, layer)), set()).add(id(layer.owner))
    for path, layer in index.layers_of(names):
        those = one[id(led.get(layer, layer))]
        shared = index.names_elsewhere(layer.owner._parameters.get(layer.spec.parameter), those)
        sites += [(path, shared[0])] if shared else []
    return sites + untied_copies(index, names)


def _leading_tables(index: AdapterIndex) -> dict[TrainableTokens, list[TrainableTokens]]:
    """Return a dict that maps each module with its own trainable token embeddings to the tied modules that use them."""
    tables = [table for _, table in index.every(TrainableTokens)]
    return {table: [other for other in tables if table.leads(other)] for table in tables if not table.follows}


def _shared_table(index: AdapterIndex, table: TrainableTokens, followers: Sequence[TrainableTokens]) -> str | None:
    """Return the name of the weight in a module that is tied to an embedding but not in `followers`, or None."""
    weight = table.token_adapter.weight_here
    members = [module.token_adapter for module in (table, *followers)]
    tied = {id(member.base_layer) for member in members if member.weight_here is weight}
    return next(iter(index.names_elsewhere(weight, tied)), None)


def _components_apart(index: AdapterIndex, names: Sequence[str], untie: bool) -> frozenset[int]:
    """Return the ids of the components that get a separate parameter when the given adapters are merged.

    These components share a parameter with another module, or will share one again when a merge with `untie` is undone.
    A module with trainable tokens always gets a separate weight if its weight is shared.
    """
    apart = set()
    tables = [table.token_adapter for _, table in index.every(TrainableTokens)]
    untied = {id(layer.tied_weight) for _, layer in index.layers() if layer.tied_weight is not None}
    untied |= {id(shared_weight) for table in tables for shared_weight in table.tied_weight}
    for _, layer in index.layers_of(names) if untie or untied else ():
        parameter = layer.source._parameters.get(layer.spec.parameter)
        if id(parameter) in untied or (untie and index.names_elsewhere(parameter, {id(layer.source)})):
            apart.add(id(layer))
    for table, followers in _leading_tables(index).items():
        if any(name in table for name in names):
            comes_back = id(table.token_adapter.weight_here) in untied
            if comes_back or _shared_table(index, table, followers) is not None:
                apart.add(id(table))
    return frozenset(apart)


WIDE = (torch.float32, torch.float64)
"""Base dtypes in which a merge is exact, because merged weights are computed in fp32 or wider."""


def explain_inexact_merge(model: nn.Module, *names: str) -> str | None:
    """Explain why merging adapters would change the outputs; return None if the merge is exact.   [docs/math.md (12)]

    A merge is exact if it changes outputs in eval mode only by rounding errors in the compute dtype: (W + ΔW)·x and
    W·x + ΔW·x are then the same sum in a different order. An exact merge requires every weight that the adapters change
    to be unquantized and in fp32 or wider, so that the merged weight (eq. 11 in docs/math.md) is stored in the dtype in
    which it is computed. A bf16 or fp16 weight loses the part of the delta that is below its precision, and a quantized
    weight loses far more. A merge is also inexact if matmuls round the weight again, as they do under autocast or with
    TF32.

    The message gives the site and its dtype, or says why a merge is not possible. The adapters are by default those in
    the default route.

    Raises:
        AdapterError: An adapter is not on the model.
    """
    index = AdapterIndex.of(model)
    chosen = names_to_merge(index, names)
    try:
        _check_mergeable(index, chosen, False, MergeOptions())
    except MergeError as refusal:
        return str(refusal)
    for path, layer in index.layers_of(chosen):
        if layer.base.quantized:
            return f"{path} is stored as {layer.base.name}, in which the merged weight would lose most of the delta."
        dtype = layer.base.tensors(layer.original())[0].dtype
        if dtype not in WIDE:
            name = str(dtype).removeprefix("torch.")
            return f"{path} is {name}, so a merged weight is rounded to that precision. In float32, a merge is exact."
        if layer.spec.groups > 1:
            return f"{path} is a convolution with {layer.spec.groups} groups, whose weight cannot hold the delta."
    return None


def merged_state_dict(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """Return the state dict of the base with adapters merged, under the original names; the model is not modified.

    The adapters are by default those in the default route.

    Returns:
        A dict from name to tensor, in the base dtype. Tensors that no adapter changes are not copied. A weight that
        is tied in the model but adapted in only one module appears under both names, with different values. Quantized
        weights are dequantized to the dtype of their matmuls, so the state dict matches that of an unquantized base.

    Raises:
        MergeError: An adapter cannot be merged.
        AdapterError: An adapter is not on the model.
    """
    index = AdapterIndex.of(model)
    chosen = names_to_merge(index, names)
    for path, part in index.components.items():
        part.check_mergeable(path, chosen)
    for path, layer in index.layers_of(chosen):
        layer.check_written(path)
    merged = _Merged(index, chosen)
    quantized = {weight.packed: weight for weight in quantized_weights(index)}
    companions = {name for weight in quantized.values() for name in weight.companions}
    options = MergeOptions(in_place=False, dense=float_dtype(index) if quantized else None)
    tensors: dict[str, Tensor] = {}
    for name, tensor, module in base_tensors(index):
        if name in quantized:
            tensors |= merged.dequantized(quantized[name], options)
        elif name not in companions:
            tensors[name] = merged.tensor(name, module, tensor)
    return tensors


class _Merged:
    """The base tensors that adapters change, computed on demand."""

    def __init__(self, index: AdapterIndex, names: Sequence[str]) -> None:
        self._names, self._options = names, MergeOptions(in_place=False)
        led = leaders_of(index, names)
        self._sites = {  # (module id, parameter name) -> layer that computes the weight; tied weights share a layer
            (id(layer.source), layer.spec.parameter): led.get(layer, layer) for _, layer in index.layers_of(names)
        }
        self._layers = {(id(layer.source), "bias"): layer for _, layer in index.layers_of(names)}
        self._tensors: dict[str, Tensor] = {}  # of saved modules and trainable tokens
        for path, component in (*index.every(ModulesToSave), *index.every(TrainableTokens)):
            tensors = component.merged_tensors(names, self._options)
            self._tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in tensors.items()}
        self._biases: dict[tuple[int, str], Tensor] = {}
        for patch in index.bias_patches():
            tensors = patch.merged_tensors(names, self._options)
            self._biases |= {(id(patch.module), leaf): tensor for leaf, tensor in tensors.items()}

    def tensor(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor:
        """Return a base tensor (…) with adapters merged; a tensor that no adapter changes is only detached."""
        target = (id(module), name.rpartition(".")[2])
        if target in self._sites:
            return self._sites[target].merged_tensors(self._names, self._options)[target[1]]
        bias = self._layers[target].merged_bias(self._names) if target in self._layers else None
        if bias is not None:
            return bias
        return self._tensors[name] if name in self._tensors else self._biases.get(target, tensor.detach())

    def dequantized(self, weight: QuantizedWeight, options: MergeOptions) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of a quantized module's weight and bias, dequantized and with adapters merged."""
        of_bias, bias = weight.name.removesuffix("weight") + "bias", weight.plain_bias
        merged = {} if weight.layer is None else weight.layer.merged_tensors(self._names, options)
        if weight.name in self._tensors:  # an adapter's copy replaces the whole module
            yield weight.name, self._tensors[weight.name]
            bias = self._tensors.get(of_bias) if bias is not None else None
        elif merged:
            yield weight.name, merged["weight"]
            bias = None if bias is None else merged.get("bias", bias)
        else:
            yield weight.name, weight.dequantized(options.dense or torch.float32)._parameters["weight"].detach()  # type: ignore[union-attr]
        if bias is not None:
            yield of_bias, bias.detach()
