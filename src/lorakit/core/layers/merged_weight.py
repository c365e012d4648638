"""One site's weight with adapters merged: computed from the original, in the form in which the base stores it.

What storing loses is measured: the rounding of a plain weight, the far larger error of a quantized one. Nothing is
changed here; `base_weight` puts the result into the module.

A convolution of several groups has no place for a delta, because its adapters reach all input channels. As a
convolution of one group it has, at the price of a weight that is `groups` times as large.
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

from lorakit.core.layers.adapter_component import MergeOptions, SiteMerge
from lorakit.core.layers.stored_weight import StoredWeight
from lorakit.core.quantization import WeightFormat, weight_format_of
from lorakit.errors import MergeError


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

    stored: Any
    base: WeightFormat
    source: nn.Module
    original: Any
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
        if options.dense is not None and base.quantised:
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


def stored_with(layer: StoredWeight, merged: Sequence[str]) -> Any:
    """Return what a site's module stores while some adapters, at least one, are merged."""
    return sum_of_updates(layer, merged, MergeOptions(dense=_dtype_of(layer.owner) if layer.replaced else None)).stored


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
