"""What a site's module stores when adapters are merged into it: made off the model first, put in place afterwards.

The sum is taken in fp32 or wider from the weight as it was before any merge, and rounded
once. It knows sites, not models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core.bases import at_least_fp32
from lorakit.core.layer import LoraLayer
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


def sum_of_updates(layer: LoraLayer, names: Sequence[str], in_place: bool) -> tuple[Any, Tensor, Tensor]:
    """What to store for W₀ + Σ update, with W₀ (out, in) and the exact sum (out, in).   [docs/math.md (11)]

    In its place in the model, the weight must also be right for an adapter that moved the base and is not merged.
    """
    with torch.no_grad():
        W = layer.read()
        total = torch.zeros_like(W)
        for name in names:
            total += layer.update(name, W)
        if in_place and layer.moved_by is not None and layer.moved_by not in names:
            total += layer.read(layer.moved_by) - W
        stored = layer.base.write(layer.owner, layer.original(), W + total)
    return stored, W, total


def merged_weight(path: str, layer: LoraLayer, new: Sequence[str], in_place: bool) -> tuple[Any, SiteMerge]:
    """What a site stores with some more adapters merged, and how much of them it takes in.

    Args:
        path: The site, for messages.
        layer: The site.
        new: Adapters to merge beside those that are.
        in_place: As for `sum_of_updates`.

    Raises:
        MergeError: The result is not finite.
    """
    stored, W, total = sum_of_updates(layer, [*layer.merged_adapters, *new], in_place)
    after = layer.base.read(layer.owner, stored)
    if not bool(torch.isfinite(after).all()):
        raise MergeError(f"Merging {', '.join(new)} at {path} gives NaN or infinite weights. Nothing was changed.")
    wanted = float(torch.linalg.vector_norm(total))
    lost = float(torch.linalg.vector_norm(after - (W + total)))
    changed = float((after != W).float().mean())
    return stored, SiteMerge(path, 1.0 if wanted == 0 else max(0.0, 1.0 - lost / wanted), changed)


def brings_bias(layer: LoraLayer, names: Sequence[str]) -> bool:
    """Whether one of some adapters has a bias of its own at a site (`lora_bias`)."""
    return any(name in layer.r and layer.factor(name).bias is not None for name in names)


def bias_for(layer: LoraLayer, names: Sequence[str]) -> Tensor | None:
    """The base's bias, (out,), with those of adapters in it; None where nothing was or is written to it."""
    old = layer.original_bias()
    if old is None or not brings_bias(layer, names):
        return layer.kept_bias
    with torch.no_grad():
        total = at_least_fp32(old).clone()
        for name in names:
            factor = layer.factor(name)
            if factor.bias is not None:
                total += factor.bias.to(total.dtype) * factor.scale
        return total.to(old.dtype)


def put_bias(layer: LoraLayer, bias: Tensor | None) -> None:
    """Put what `bias_for` made, (out,), in place; None leaves the bias alone."""
    if bias is None:
        return
    held: nn.Parameter = layer.owner._parameters["bias"]  # type: ignore[assignment]
    old = held.detach() if layer.kept_bias is None else layer.kept_bias
    layer.kept_bias = None if bias is layer.kept_bias else old
    held.data = bias


@dataclass(frozen=True)
class Built:
    """What a site's weight becomes, ready to be put in place.

    Attributes:
        stored: What the module will store.
        kept: What it stored before any merge, or None.
        own: A parameter of its own, where it was tied, or None.
        bias: The module's bias, (out,), or None where none is written to.
    """

    stored: Any
    kept: Any
    own: nn.Parameter | None
    bias: Tensor | None


def built_for(layer: LoraLayer, stored: Any, new: Sequence[str], keep_base: KeepBase, untie: bool) -> Built:
    """Everything that a merge puts in place at a site.

    Args:
        layer: The site.
        stored: What its module will store.
        new: The adapters that are merged by it.
        keep_base: Whether and where the original is kept.
        untie: The weight becomes a parameter of its own.
    """
    kept = layer.kept
    if keep_base is not False and kept is None:
        kept = layer.original()
        kept = kept.to("cpu") if keep_base == "cpu" and not layer.base.quantised else kept
    weight = layer.owner._parameters.get(layer.slot.parameter)
    own = None if weight is None or not untie else nn.Parameter(stored, requires_grad=weight.requires_grad)
    return Built(stored, kept, own, bias_for(layer, [*layer.merged_adapters, *new]))


def put_weight(layer: LoraLayer, built: Built, names: Sequence[str]) -> None:
    """Put what `built_for` made in place; from then on these adapters are merged here."""
    owner, parameter = layer.owner, layer.slot.parameter
    layer.kept = built.kept
    if built.own is not None:  # the other holder keeps the old one
        layer.tied_weight = owner._parameters[parameter] if layer.tied_weight is None else layer.tied_weight
        owner._parameters[parameter] = built.own
    else:
        layer.base.place(owner, parameter, built.stored)
    put_bias(layer, built.bias)
    layer.merged_adapters = [*layer.merged_adapters, *names]


def stored_for(layer: LoraLayer, merged: Sequence[str]) -> Any:
    """What a site's module stores while these adapters are merged: the original where there are none.

    Args:
        layer: The site.
        merged: Adapters.
    """
    if merged:
        return sum_of_updates(layer, merged, in_place=True)[0]
    return layer.moved if layer.moved_by is not None else layer.original()
