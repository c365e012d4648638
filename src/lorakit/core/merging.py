"""Merge adapters into the base weight, and take them out again to the very bit.

A merge computes W₀ + Σ update in fp32 or wider from the base as it was, and writes it once in the base's dtype. The
original weight is kept (on its device or in main memory) unless the caller gives it up, so several merges
come out in any order. What a low-precision base could not take in is measured and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core.checks import check_known
from lorakit.core.extras import BiasSwitch, ModuleCopies
from lorakit.core.layer import LoraLayer
from lorakit.core.sitemap import base_tensors, copies, holders, layers, state_of
from lorakit.core.variants import variant_named
from lorakit.errors import MergeError

KeepBase = Literal[True, False, "cpu"]


@dataclass(frozen=True)
class SiteMerge:
    """How one site took a merge.   [docs/math.md (12)]

    Attributes:
        path: The site.
        survived: Share of the delta that the stored weight took in, 1 − ‖W' − (W₀ + Δ)‖ / ‖Δ‖, at least 0.
        changed: Share of the weight's elements that changed.
    """

    path: str
    survived: float
    changed: float


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


def merge(model: nn.Module, *names: str, keep_base: KeepBase = True, untie: bool = False) -> MergeReport:
    """Write adapters into the base weights; from then on they belong to the default route, until they are unmerged.

    Args:
        model: An adapted model, changed in place.
        names: Adapters; none means those of the default route.
        keep_base: Keep each original weight on its device (True), in main memory ("cpu"), or not (False: this
            cannot be undone).
        untie: Give a site that shares its weight with another module (tied embeddings) a weight of its own.

    Returns:
        How much survived, and what the kept originals cost.

    Raises:
        MergeError: Already merged, not mergeable, a weight is shared, or the result is not finite.
        AdapterError: There is no such adapter.
    """
    return _merge(model, names, keep_base, untie, in_place=True)


def _merge(model: nn.Module, names: Sequence[str], keep_base: KeepBase, untie: bool, in_place: bool) -> MergeReport:
    """`merge`; with `in_place` false, an adapter that moved the base and is not merged is left out of account."""
    state = state_of(model)
    chosen = tuple(names or state.default.names)
    check_known(state, chosen)
    _check_mergeable(model, chosen, untie)
    here = [(path, layer, [n for n in chosen if n in layer.r]) for path, layer in layers(model)]
    here = [(path, layer, new) for path, layer, new in here if new]
    if keep_base is False:  # two passes instead of a copy: all is known to be sound before the first weight changes
        reports = [_merged_weight(path, layer, new, in_place)[1] for path, layer, new in here]
        for path, layer, new in here:
            _put(layer, _built(layer, _merged_weight(path, layer, new, in_place)[0], keep_base, untie), new)
    else:  # whatever takes memory comes before the first change
        built = []
        reports = []
        for path, layer, new in here:
            stored, report = _merged_weight(path, layer, new, in_place)
            built.append(_built(layer, stored, keep_base, untie))
            reports.append(report)
        for (_, layer, new), weight in zip(here, built, strict=True):
            _put(layer, weight, new)
    for _, holder in copies(model):
        holder.merged_adapter = next((n for n in chosen if n in holder.modules_to_save), holder.merged_adapter)
    state.join_default(chosen)
    kept = sum(layer.kept.numel() * layer.kept.element_size() for _, layer in layers(model) if layer.kept is not None)
    return MergeReport(chosen, tuple(reports), kept)


def unmerge(model: nn.Module, *names: str) -> None:
    """Take adapters out of the base weights; with the last of them the very bits are back.

    Args:
        model: An adapted model, changed in place.
        names: Adapters; none means all that are merged.

    Raises:
        MergeError: One of them is not merged, or the base's bits were not kept.
    """
    state = state_of(model)
    merged = {name for _, layer in layers(model) for name in layer.merged_adapters}
    merged |= {holder.merged_adapter for _, holder in copies(model) if holder.merged_adapter}
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
            ready.append((layer, left, stored_for(layer, left)))
    for layer, left, stored in ready:
        layer.base.place(layer.owner, layer.slot.parameter, stored)
        layer.merged_adapters = left
        if not left:
            layer.kept = layer.kept if layer.moved_by is not None else None
            if layer.tied_weight is not None:
                layer.owner._parameters[layer.slot.parameter], layer.tied_weight = layer.tied_weight, None
    for _, holder in copies(model):
        holder.merged_adapter = None if holder.merged_adapter in chosen else holder.merged_adapter
    state.leave_default(chosen)


def stored_for(layer: LoraLayer, merged: Sequence[str]) -> Any:
    """What a site's module stores while these adapters are merged: the original where there are none.

    Args:
        layer: The site.
        merged: Adapters.
    """
    if merged:
        return _sum_of_updates(layer, merged, in_place=True)[0]
    return layer.moved_base() if layer.moved_by is not None else layer.original()


def merge_and_unload(model: nn.Module, *names: str, untie: bool = False) -> MergeReport:
    """Merge adapters for good and take every trace of adapters off the model; nothing is kept, site by site.

    Args:
        model: An adapted model, changed in place into a plain one.
        names: Adapters to merge; none means those of the default route. Others are dropped.
        untie: As `merge`.

    Returns:
        How much of the deltas survived.

    Raises:
        MergeError: As `merge`.
        AdapterError: There is no such adapter.
    """
    state = state_of(model)
    report = _merge(model, names, keep_base=False, untie=untie, in_place=False)
    for _, layer in layers(model):
        if layer.moved_by is not None and layer.moved_by not in layer.merged_adapters:
            layer.moved_by = None
            layer.base.place(layer.owner, layer.slot.parameter, stored_for(layer, layer.merged_adapters))
    for module in list(model.modules()):
        for attribute, child in list(module._modules.items()):
            if isinstance(child, LoraLayer):
                module._modules[attribute] = child.owner
            elif isinstance(child, ModuleCopies):
                merged = child.merged_adapter
                module._modules[attribute] = child.modules_to_save[merged] if merged else child.original_module
    dropped = set(state.configs) - set(report.names)
    for module in model.modules():
        BiasSwitch.uninstall(module, dropped)
        BiasSwitch.forget(module)
    for parameter, trained in state.frozen:
        parameter.requires_grad_(trained)
    return report


def merged_state_dict(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """The state dict of the base with adapters merged, under the base's own names; the model is left alone.

    Args:
        model: An adapted model.
        names: Adapters; none means those of the default route.

    Returns:
        Name -> tensor (…) in the base's dtype. Tensors without an adapter are the model's own, not copies. A weight
        that is tied in the model and adapted in one place appears under both names, no longer the same.

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
    _check_variants(model, chosen)
    sites = {(id(layer.owner), layer.slot.parameter): layer for _, layer in layers(model)}
    replaced = _copied_tensors(model, chosen)
    for name, tensor, module in base_tensors(model):
        leaf = name.rpartition(".")[2]
        layer = sites.get((id(module), leaf))
        if layer is not None:
            here = [n for n in chosen if n in layer.r]
            yield name, _sum_of_updates(layer, here, in_place=False)[0] if here else tensor.detach()
        elif name in replaced:
            yield name, replaced[name]
        else:
            biases = [s for s in BiasSwitch.on(module) if s.adapter in chosen and leaf in s.originals]
            yield name, (module._parameters[leaf] if biases else tensor).detach()  # type: ignore[union-attr]


def check_unmergeable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to unmerge where the base's bits were given up.

    Raises:
        MergeError: The message names the adapter and a site.
    """
    for path, layer in layers(model):
        lost = [name for name in names if name in layer.merged_adapters]
        if lost and layer.kept is None:
            raise MergeError(
                f"Adapter {lost[0]!r} was merged with keep_base=False, so the bits of {path} are gone. "
                "Load the base anew."
            )


def _check_mergeable(model: nn.Module, names: Sequence[str], untie: bool) -> None:
    _check_variants(model, names)
    if not names:
        raise MergeError("No adapter is active, so there is nothing to merge. Name the adapters.")
    for path, layer in layers(model):
        here = [name for name in names if name in layer.r]
        twice = [name for name in here if name in layer.merged_adapters]
        if twice:
            raise MergeError(f"Adapter {twice[0]!r} is merged already. Unmerge it first.")
        if here and layer.merged_adapters and layer.kept is None:
            raise MergeError(
                f"{path} holds {', '.join(layer.merged_adapters)}, merged with keep_base=False, so its base is gone. "
                "Load the base anew and merge all adapters in one call."
            )
    for path, other in tied_sites(model, names) if not untie else ():
        raise MergeError(
            f"{path} shares its weight with {other}; a merge would change both. Merge with untie=True to give "
            f"{path} a weight of its own (and save with tie_word_embeddings=False), or do not adapt it."
        )


def tied_sites(model: nn.Module, names: Sequence[str]) -> list[tuple[str, str]]:
    """The sites of some adapters whose weight another module shares, each with the name of the other."""
    held, found = holders(model), []
    for path, layer in layers(model):
        if any(name in layer.r for name in names):
            parameter = layer.owner._parameters.get(layer.slot.parameter)
            shared = [name for name, module in held.get(id(parameter), ()) if module is not layer.owner]
            found += [(path, shared[0])] if shared else []
    return found


def _check_variants(model: nn.Module, names: Sequence[str]) -> None:
    for path, layer in layers(model):
        for name in names:
            if name in layer.r and not variant_named(layer.variant[name]).mergeable:
                raise MergeError(f"Adapter {name!r} at {path} is {layer.variant[name]}, which cannot be merged.")


def _sum_of_updates(layer: LoraLayer, names: Sequence[str], in_place: bool) -> tuple[Any, Tensor, Tensor]:
    """What to store for W₀ + Σ update, with W₀ (out, in) and the exact sum (out, in).   [docs/math.md (11)]

    In its place in the model, the weight must also be right for an adapter that moved the base and is not merged. Where
    the base was moved, the sum begins at the moved weight, so that it is rounded once.
    """
    with torch.no_grad():
        W = layer.read()
        from_moved = layer.moved_by is not None and (in_place or layer.moved_by in names)
        start = layer.read(layer.moved_by) if from_moved else W
        total = torch.zeros_like(W)
        for name in names:
            total += layer.addition(name, W)
        stored = layer.base.write(layer.owner, layer.original(), start + total)
        if from_moved:
            total += start - W
    return stored, W, total


def _merged_weight(path: str, layer: LoraLayer, new: Sequence[str], in_place: bool) -> tuple[Any, SiteMerge]:
    stored, W, total = _sum_of_updates(layer, [*layer.merged_adapters, *new], in_place)
    after = layer.base.read(layer.owner, stored)
    if not bool(torch.isfinite(after).all()):
        raise MergeError(f"Merging {', '.join(new)} at {path} gives NaN or infinite weights. Nothing was changed.")
    wanted = float(torch.linalg.vector_norm(total))
    lost = float(torch.linalg.vector_norm(after - (W + total)))
    changed = float((after != W).float().mean())
    return stored, SiteMerge(path, 1.0 if wanted == 0 else max(0.0, 1.0 - lost / wanted), changed)


@dataclass(frozen=True)
class _Built:
    """What a site's weight becomes, ready to be put in place: the thing to store, or a parameter of its own."""

    stored: Any
    kept: Any
    own: nn.Parameter | None


def _built(layer: LoraLayer, stored: Any, keep_base: KeepBase, untie: bool) -> _Built:
    kept = layer.kept
    if keep_base is not False and kept is None:
        kept = layer.original()
        kept = kept.to("cpu") if keep_base == "cpu" and not layer.base.quantised else kept
    weight = layer.owner._parameters.get(layer.slot.parameter)
    own = None if weight is None or not untie else nn.Parameter(stored, requires_grad=weight.requires_grad)
    return _Built(stored, kept, own)


def _put(layer: LoraLayer, built: _Built, names: Sequence[str]) -> None:
    owner, parameter = layer.owner, layer.slot.parameter
    layer.kept = built.kept
    if built.own is not None:  # the other holder keeps the old one
        layer.tied_weight = owner._parameters[parameter] if layer.tied_weight is None else layer.tied_weight
        owner._parameters[parameter] = built.own
    else:
        layer.base.place(owner, parameter, built.stored)
    layer.merged_adapters = [*layer.merged_adapters, *names]


def _copied_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Name in the base -> tensor (…) of the copy that an adapter trained in its place."""
    found: dict[str, Tensor] = {}
    for path, holder in copies(model):
        for name in names:
            if name in holder.modules_to_save:
                for leaf, tensor in holder.modules_to_save[name].state_dict().items():
                    found[f"{path}.{leaf}"] = tensor
    return found
