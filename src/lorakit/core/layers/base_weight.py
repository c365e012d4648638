"""`BaseWeight`: how the base weight of a layer changes when adapters are merged, unmerged or unloaded.

A merge is staged (everything is computed, checked and allocated) and then committed. The layer knows only its own
weight; `merging` decides which layers change, and in which order.

`sum_of_updates` computes the merged weight from the original, in the form in which the base stores it, and changes
nothing. `merged_weight` also measures what storing it loses: the rounding error of a plain weight, or the far larger
error of a quantized one.

The weight of a grouped convolution cannot hold an update, because an adapter reads all input channels. It is merged
into a convolution of one group instead, whose weight is `groups` times as large.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layers.adapter_component import MergeOptions, SiteMerge, StagedMerge
from lorakit.core.layers.stored_weight import StoredWeight, give_back, set_bias
from lorakit.core.quantization import NOT_WRITTEN, Stored, WeightFormat, at_least_fp32, weight_format_of
from lorakit.core.variants import variant_named
from lorakit.errors import MergeError


@dataclass(frozen=True)
class StagedBias:
    """A bias that is ready to be put into the base.

    Attributes:
        value: The bias, (out,).
        kept: The base's own, (out,), from before; None if `value` is the base's own.
    """

    value: Tensor
    kept: Tensor | None


class BaseWeight(StoredWeight):
    """A module around a base module, into one of whose weights adapters are merged."""

    def check_mergeable(self, path: str, adapters: Sequence[str]) -> None:
        """Reject adapters that no weight can hold, or whose bias has no place; nothing is computed.

        Args:
            path: This layer's path, for messages.
            adapters: Adapters; those without a factor here are ignored.

        Raises:
            MergeError: The message names the adapter and the path.
        """
        for name in adapters:
            variant = variant_named(self.variant[name]) if name in self.r else None
            if variant is not None and not variant.is_mergeable:
                raise MergeError(
                    f"Adapter {name!r} at {path} is {variant.title}, which cannot be merged: "
                    f"{variant.unmergeable_reason}. Keep it next to the base.",
                    what=name,
                    where=path,
                )
        self._check_place_of_bias(path, adapters)

    def _check_place_of_bias(self, path: str, adapters: Sequence[str]) -> None:
        """Refuse a bias of B where the base has none, or where another adapter trains the base's."""
        bringing = [name for name in adapters if self.bias_of(name) is not None]
        if not bringing:
            return
        trainer = None if self.old_bias is None else self.old_bias[0]
        for name in bringing:
            if trainer is not None and name != trainer:
                raise MergeError(
                    f"Adapter {name!r} brings a bias of its own (lora_bias), and adapter {trainer!r} trains the base's "
                    f"at {path}, so it cannot be merged. Detach {trainer!r} first.",
                    what=name,
                    where=path,
                    field="lora_bias",
                )
        if self.original_bias() is None:
            raise MergeError(
                f"Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: {path} has no "
                "place for the adapter's.",
                where=path,
                field="lora_bias",
            )

    def check_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> None:
        """Reject a merge that this weight cannot take now; nothing is computed.

        Args:
            path: This layer's path, for messages.
            adapters: Adapters; those without a factor here are ignored.
            options: How they are merged.

        Raises:
            MergeError: An adapter is merged already or cannot be, or the weight cannot be written.
        """
        here = [name for name in adapters if name in self.r]
        if not here:
            return
        self.check_mergeable(path, here)
        twice = [name for name in here if name in self.merged_adapters]
        if twice:
            raise MergeError(f"Adapter {twice[0]!r} is merged already. Unmerge it first.", what=twice[0])
        base = self.base
        if not base.written:
            raise MergeError(NOT_WRITTEN.format(parameter=self.slot.parameter, type=type(self.owner).__name__))
        if self.merged_adapters and not self.keeps_base:
            raise MergeError(
                f"{path} holds {', '.join(self.merged_adapters)}, merged with keep_base=False, so its base is gone. "
                "Load the base anew and merge all adapters in one call.",
                where=path,
            )
        replaces = options.dense is not None and (base.quantized or self.slot.groups > 1)
        if replaces and self.old_bias is not None and (options.in_place or self.old_bias[0] not in adapters):
            trainer = self.old_bias[0]
            raise MergeError(
                f"dense=True puts another module at {path}, whose bias adapter {trainer!r} trains in place. Detach "
                f"{trainer!r} first, or merge with dense=False.",
                what=trainer,
                where=path,
            )

    def check_unmerge(self, path: str, adapters: Sequence[str]) -> None:
        """Reject to unmerge adapters if the base's values were not kept.

        Args:
            path: This layer's path, for messages.
            adapters: Adapters; those that are not merged here are ignored.

        Raises:
            MergeError: The message names the adapter and the path.
        """
        lost = [name for name in adapters if name in self.merged_adapters]
        if lost and not self.keeps_base:
            raise MergeError(
                f"Adapter {lost[0]!r} was merged with keep_base=False, so the bits of {path} are gone. "
                "Load the base anew.",
                what=lost[0],
                where=path,
            )

    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Compute the weight with more adapters merged, and measure it; nothing is changed.

        With `keep_base=False` the weight is dropped once it is measured, and committing computes it again: two passes
        instead of a second copy of the model.

        Args:
            path: This layer's path, for the report and for messages.
            adapters: Adapters; those without a factor here are ignored.
            options: How they are merged.

        Raises:
            MergeError: The result is not finite.
        """
        new = [name for name in adapters if name in self.r]
        if not new:
            return None
        merged, report = merged_weight(path, self, new, options)
        bias = self._staged_bias([*self.merged_adapters, *new])
        if options.keep_base is False:
            return StagedMerge(report, functools.partial(self._write_unkept, new, options, bias))
        kept = self.kept
        if kept is None and not isinstance(merged.stored, nn.Module):
            kept = merged.original
            if options.keep_base == "cpu" and isinstance(kept, Tensor) and not merged.base.quantized:
                kept = kept.to("cpu")
        storage = merged.base, merged.source  # without the tensors that were only needed to measure
        put = functools.partial(self._put_merged, merged.stored, storage, kept, id(self) in options.apart, bias)
        return StagedMerge(report, functools.partial(put, keeps=True, names=new))

    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Compute the weight without some adapters; without any, these are the original bits.

        Args:
            adapters: Adapters; those that are not merged here are ignored.

        Raises:
            MergeError: The base's values were not kept.
        """
        left = [name for name in self.merged_adapters if name not in adapters]
        if left == self.merged_adapters:
            return None
        stored, bias = self.stored_with(left), self._staged_bias(left)
        return StagedMerge(None, functools.partial(self._put_unmerged, stored, bias, left))

    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return the weight, and the bias if an adapter brings one, with adapters merged; the layer is not changed.

        Args:
            adapters: Adapters; those without a factor here are ignored.
            options: How they are merged; `dense` gives quantized weights as plain ones.

        Returns:
            Name of the parameter -> tensor (…); empty if no adapter has a factor here.

        Raises:
            MergeError: An adapter has no place in the weight, or its bias is not finite.
        """
        here = [name for name in adapters if name in self.r]
        if not here:
            return {}
        stored = sum_of_updates(self, here, options).stored
        found = {self.slot.parameter: stored} if isinstance(stored, Tensor) else {}
        if isinstance(stored, nn.Module):
            found = {name: held.detach() for name, held in stored._parameters.items() if held is not None}
        bias = self.merged_bias(here)
        return found if bias is None else {**found, "bias": bias}

    def merged_bias(self, adapters: Sequence[str]) -> Tensor | None:
        """Return the base's bias, (out,), with those of adapters in it; None if none of them brings one.

        Args:
            adapters: Adapters; those without a factor here are ignored.

        Raises:
            MergeError: It would not be finite.
        """
        staged = self._staged_bias(adapters) if any(self.bias_of(name) is not None for name in adapters) else None
        return None if staged is None else staged.value

    def unload(self) -> nn.Module:
        """Return the base's module with what is merged in it; a base that other adapters moved is moved back."""
        if self.moved_by and not set(self.moved_by).intersection(self.merged_adapters):
            self.moved_by = ()
            self.place(self.stored_with(self.merged_adapters))
        return self.owner

    def follow(self, leader: BaseWeight) -> None:
        """Take over what was merged or unmerged at the layer that leads this one: they share one weight.

        Args:
            leader: A layer whose weight is this one's too, and whose factors this one uses.
        """
        self.merged_adapters = list(leader.merged_adapters)
        if self.merged_adapters or not self.moved_by:
            self.kept = leader.kept if self.merged_adapters else None

    def stored_with(self, merged: Sequence[str]) -> Stored | nn.Module:
        """Return what the base's module stores while these adapters are merged: the original if there are none."""
        if merged:
            options = MergeOptions(dense=_dtype_of(self.owner) if self.replaced else None)
            return sum_of_updates(self, merged, options).stored
        return self.moved_base() if self.moved_by else self.original()

    def _write_unkept(self, new: Sequence[str], options: MergeOptions, bias: StagedBias | None) -> None:
        """Compute the merged weight again and put it in place; the original is not kept."""
        merged = weight_with(self, new, options)
        storage = merged.base, merged.source
        self._put_merged(merged.stored, storage, self.kept, id(self) in options.apart, bias, keeps=False, names=new)

    def _put_merged(
        self,
        stored: Stored | nn.Module,
        storage: tuple[WeightFormat[Any, Any], nn.Module],
        kept: Stored | None,
        apart: bool,
        bias: StagedBias | None,
        *,
        keeps: bool,
        names: Sequence[str],
    ) -> None:
        """Put a merged weight in place; if it is apart, in a parameter of this site's own."""
        (base, source), parameter = storage, self.slot.parameter
        self.kept = kept
        shared = self.owner._parameters.get(parameter) if apart and not base.quantized else None
        if shared is not None and isinstance(stored, Tensor):  # the other holder keeps the old one
            if keeps and self.tied_weight is None:
                self.tied_weight = shared
            self.owner._parameters[parameter] = nn.Parameter(stored, requires_grad=shared.requires_grad)
        else:
            if isinstance(stored, nn.Module) or self.replaced:
                self.place(stored)
            else:
                base.place(source, parameter, stored)
            if not keeps:
                self.replaced = ()
        self._put_bias(bias)
        self.merged_adapters = [*self.merged_adapters, *names]

    def _put_unmerged(self, stored: Stored | nn.Module, bias: StagedBias | None, left: list[str]) -> None:
        if self.tied_weight is not None and not left and isinstance(stored, Tensor):
            give_back(self.owner, self.slot.parameter, self.tied_weight, stored)
            self.tied_weight = None
        else:
            self.place(stored)
        self._put_bias(bias)
        self.merged_adapters = left
        if not left:
            self.kept = self.kept if self.moved_by else None

    def _staged_bias(self, adapters: Sequence[str]) -> StagedBias | None:
        """The base's bias with those of adapters in it; None if nothing was or will be written to it.

        Raises:
            MergeError: It would not be finite.
        """
        bringing = [name for name in adapters if self.bias_of(name) is not None]
        if not bringing and self.kept_bias is None:
            return None
        old = self.original_bias()
        if old is None or not bringing:
            return None if old is None else StagedBias(old, None)
        with torch.no_grad():
            total = at_least_fp32(old).clone()
            for name in bringing:
                factor = self.factor(name)
                total += factor.bias.to(total.dtype) * factor.scale  # type: ignore[union-attr]
            if not bool(torch.isfinite(total).all()):
                raise MergeError(
                    f"NaNs detected in the merged weights: the bias of B of {', '.join(adapters)} is NaN or infinite. "
                    "Nothing was changed."
                )
            return StagedBias(total.to(old.dtype), old.detach())

    def _put_bias(self, staged: StagedBias | None) -> None:
        if staged is not None:
            self.kept_bias = staged.kept
            set_bias(self.owner, staged.value)


@dataclass(frozen=True)
class MergedWeight:
    """The weight of a site with adapters merged.

    Attributes:
        stored: What to store, or a plain module to put in place of the base's.
        base: How the weight is stored now.
        source: The module that stores it now.
        original: What that module stored before anything was merged.
        W: The weight before anything was merged, (out, in).
        total: The exact sum of updates, like W.
    """

    stored: Stored | nn.Module
    base: WeightFormat[Any, Any]
    source: nn.Module
    original: Stored
    W: Tensor
    total: Tensor


def in_one_group(layer: StoredWeight, names: Sequence[str]) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a convolution that does in one group what a site does with adapters merged.

    Args:
        layer: A site on a convolution of several groups.
        names: The adapters.

    Returns:
        The module, and as one group's weights (out, in, k…) the base's and the exact sum of updates.
    """
    kind, source = layer.kind, layer.storage[1]
    slot = dataclasses.replace(layer.slot, groups=1)
    shape = (slot.out_features, slot.in_features, *slot.kernel)
    W = kind.flat_weight(layer.slot, layer.read()).reshape(shape)
    total = torch.zeros_like(W)
    for name in names:
        factor = layer.factor(name)
        if factor.variant.update is None:
            continue  # refused before anything is merged
        A, B = (half.to(W.dtype) for half in factor.multiplied())
        A, B = kind.flat(layer.slot, A, B)
        wide = dataclasses.replace(factor, A=A.view(-1, *shape[1:]), B=B.view(*B.shape, *[1] * len(slot.kernel)))
        delta = (B @ A).view(shape) * factor.scale
        total += factor.variant.update(kind, slot, W, delta, wide)
    return _convolution(source, W + total), W, total


def _convolution(source: Any, W: Tensor) -> nn.Module:
    """Return a convolution of one group with strides, padding and bias of another and the weight W (out, in, k…)."""
    moves = {name: getattr(source, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    made = nn.utils.skip_init(
        type(source), W.shape[1], W.shape[0], source.kernel_size, bias=False, device=W.device, **moves
    )
    made.weight = nn.Parameter(W.to(source.weight.dtype), requires_grad=source.weight.requires_grad)
    made.bias = source.bias
    return made.train(source.training)


def sum_of_updates(layer: StoredWeight, names: Sequence[str], options: MergeOptions) -> MergedWeight:
    """Return what to store for W₀ + Σ update, with W₀ (out, in) and the exact sum (out, in).   [docs/math.md (11)]

    In its place in the model, the weight must also be right for an adapter that moved the base and is not merged; where
    the moved weight counts, the sum begins there, so that it is rounded once. A plain module that holds the sum can be
    stored instead of a quantized weight or of a convolution of several groups.

    Args:
        layer: The site's layer.
        names: The adapters, at least one.
        options: How they are merged.
    """
    with torch.no_grad():
        (base, source), original = layer.storage, layer.original()
        if options.dense is not None and layer.slot.groups > 1:
            stored, W, total = in_one_group(layer, names)
            return MergedWeight(stored, base, source, original, W, total)
        W = base.read(source, original)
        from_moved = bool(layer.moved_by) and (options.in_place or not set(layer.moved_by).isdisjoint(names))
        start = layer.read(layer.moved_by[0]) if from_moved else W
        total = functools.reduce(torch.add, (layer.addition(name, W) for name in names))
        if options.dense is not None and base.quantized:
            stored = base.dense(source, start + total, options.dense)
        else:
            stored = base.write(source, original, start + total)
        if from_moved:
            total = total + (start - W)
    return MergedWeight(stored, base, source, original, W, total)


def weight_with(layer: StoredWeight, new: Sequence[str], options: MergeOptions) -> MergedWeight:
    """Return `sum_of_updates` of what is merged at a site and of more adapters, as an earlier merge left the site.

    Args:
        layer: The site's layer.
        new: The adapters that join those merged already.
        options: How they are merged.
    """
    if layer.replaced:  # a plain module replaced the quantized one in an earlier merge, and stays
        options = dataclasses.replace(options, dense=_dtype_of(layer.owner))
    return sum_of_updates(layer, [*layer.merged_adapters, *new], options)


def _dtype_of(module: nn.Module) -> torch.dtype:
    dtype: torch.dtype = module.weight.dtype  # type: ignore[assignment]
    return dtype


def merged_weight(
    path: str, layer: StoredWeight, new: Sequence[str], options: MergeOptions
) -> tuple[MergedWeight, SiteMerge]:
    """Return the weight of a site with more adapters merged, and what storing it loses.

    Args:
        path: The site.
        layer: Its layer.
        new: The adapters that join those merged already.
        options: How they are merged.

    Raises:
        MergeError: The result is not finite.
    """
    merged = weight_with(layer, new, options)
    W, total, after, exact = merged.W, merged.total, _read_back(merged), merged.W + merged.total
    wanted, whole = float(torch.linalg.vector_norm(total)), float(torch.linalg.vector_norm(exact))
    lost = float(torch.linalg.vector_norm(exact.sub_(after)))
    if not math.isfinite(lost) and not bool(torch.isfinite(after).all()):  # finite, it speaks for every element
        raise MergeError(
            f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken: merging it at "
            f"{path} gives NaN or infinite weights. Nothing was changed.",
            what=", ".join(new),
            where=path,
        )
    changed = int(torch.count_nonzero(after != W)) / max(after.numel(), 1)
    error = lost / max(whole, torch.finfo(torch.float32).tiny)
    return merged, SiteMerge(path, 1.0 if wanted == 0 else max(0.0, 1.0 - lost / wanted), changed, error)


def _read_back(merged: MergedWeight) -> Tensor:
    """Return what a merge stores as values again: (out, in)."""
    stored = merged.stored
    if isinstance(stored, nn.Module):
        row = weight_format_of(stored)
        return row.read(stored, row.stored(stored, "weight"))
    return merged.base.read(merged.source, stored)
