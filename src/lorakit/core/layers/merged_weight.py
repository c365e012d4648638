"""A convolution of several groups with adapters in it, as a convolution of one group.

Its adapters reach all input channels, which its own weight has no place for. In one group there is place, at the price
of a weight that is `groups` times as large.

One site's weight with adapters in it: computed from the original, written as the base stores it, put in place.

What writing loses is measured: the rounding of a plain weight, the far larger error of a quantised one. It knows one
layer at a time; which layers and when is `merging`'s business.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.quantization import base_of
from lorakit.core.variants import variant_named
from lorakit.errors import MergeError


def in_one_group(layer: LoraLayer, names: Sequence[str]) -> tuple[nn.Module, Tensor, Tensor]:
    """The convolution that does in one group what a site does with adapters merged.

    Args:
        layer: A site on a convolution of several groups.
        names: The adapters.

    Returns:
        The module, and as one group's weights (out, in, k…) the base's and the exact sum of updates.
    """
    kind, source = layer.kind, layer.source
    slot = dataclasses.replace(layer.slot, groups=1)
    shape = (slot.out_features, slot.in_features, *slot.kernel)
    W = kind.flat_weight(layer.slot, layer.read()).reshape(shape)
    total = torch.zeros_like(W)
    for name in names:
        factor = layer.factor(name)
        A, B = kind.flat(layer.slot, factor.A.to(W.dtype), factor.B.to(W.dtype))
        wide = dataclasses.replace(factor, A=A.view(-1, *shape[1:]), B=B.view(*B.shape, *[1] * len(slot.kernel)))
        delta = (B @ A).view(shape) * factor.scale
        total += variant_named(factor.variant).update(kind, slot, W, delta, wide)
    return _convolution(source, W + total), W, total


def _convolution(source: Any, W: Tensor) -> nn.Module:
    """A convolution that moves as another does, of one group, with the weight W (out, in, k…) and the other's bias."""
    moves = {name: getattr(source, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    made = nn.utils.skip_init(
        type(source), W.shape[1], W.shape[0], source.kernel_size, bias=False, device=W.device, **moves
    )
    made.weight = nn.Parameter(W.to(source.weight.dtype), requires_grad=source.weight.requires_grad)
    made.bias = source.bias
    return made.train(source.training)


KeepBase = Literal[True, False, "cpu"]


class How(NamedTuple):
    """In which way adapters are written.

    Attributes:
        in_place: The weight stays where adapters act, so it must be right for one that moved the base, too.
        dense: The dtype of the plain module that takes the place of a quantised one whose products have none of their
            own; None where quantised modules stay.
    """

    in_place: bool = True
    dense: torch.dtype | None = None


@dataclass(frozen=True)
class SiteMerge:
    """How one site took a merge.   [docs/math.md (12)]

    Attributes:
        path: The site.
        retained: Share of the delta that the stored weight took in, 1 − ‖W' − (W₀ + Δ)‖ / ‖Δ‖, at least 0.
        changed: Share of the weight's elements that changed.
        error: What writing lost, over the weight: ‖W' − (W₀ + Δ)‖ / ‖W₀ + Δ‖.
    """

    path: str
    retained: float
    changed: float
    error: float


def stored_for(layer: LoraLayer, merged: Sequence[str]) -> Any:
    """What a site's module stores while these adapters are merged: the original where there are none.

    Args:
        layer: The site.
        merged: Adapters.
    """
    if merged:
        dtype: Any = layer.owner.weight.dtype if layer.replaced else None
        return sum_of_updates(layer, merged, How(dense=dtype))[0]
    return layer.moved_base() if layer.moved_by is not None else layer.original()


def keeps_base(layer: LoraLayer) -> bool:
    """Whether the weight from before the first merge is still there."""
    return layer.kept is not None or bool(layer.replaced)


def kept_bytes(layer: LoraLayer) -> int:
    """Memory that the original of a merged site takes."""
    if not keeps_base(layer):
        return 0
    kept = layer.kept if layer.kept is not None else layer.base.stored(layer.source, layer.slot.parameter)
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.base.tensors(kept))


def sum_of_updates(layer: LoraLayer, names: Sequence[str], how: How) -> tuple[Any, Tensor, Tensor]:
    """What to store for W₀ + Σ update, with W₀ (out, in) and the exact sum (out, in).   [docs/math.md (11)]

    In its place in the model, the weight must also be right for an adapter that moved the base and is not merged; where
    the moved weight counts, the sum begins there, so that it is rounded once. In the place of a quantised weight or of
    a convolution of several groups, a plain module that holds the sum can be what is stored.
    """
    with torch.no_grad():
        if how.dense is not None and layer.slot.groups > 1:
            return in_one_group(layer, names)
        W = layer.read()
        from_moved = layer.moved_by is not None and (how.in_place or layer.moved_by in names)
        start = layer.read(layer.moved_by) if from_moved else W
        total = functools.reduce(torch.add, (layer.addition(name, W) for name in names))
        if how.dense is not None and layer.base.quantised:
            stored: Any = layer.base.dense(layer.source, start + total, how.dense)
        else:
            stored = layer.base.write(layer.source, layer.original(), start + total)
        if from_moved:
            total = total + (start - W)
    return stored, W, total


def weight_with(layer: LoraLayer, new: Sequence[str], how: How) -> tuple[Any, Tensor, Tensor]:
    """`sum_of_updates` of what is merged at a site and of some more adapters, as an earlier merge left the site.

    Args:
        layer: The site's layer.
        new: The adapters that join those merged already.
        how: In which way.

    Returns:
        What to store, W₀ (out, in) and the exact sum of updates (out, in).
    """
    if layer.replaced:  # a plain module stands there since an earlier merge, and stays
        standing: Any = layer.owner
        how = how._replace(dense=standing.weight.dtype)
    return sum_of_updates(layer, [*layer.merged_adapters, *new], how)


def merged_weight(path: str, layer: LoraLayer, new: Sequence[str], how: How) -> tuple[Any, SiteMerge]:
    """What to store at a site with more adapters merged, and how that took them.

    Args:
        path: The site.
        layer: Its layer.
        new: The adapters that join those merged already.
        how: In which way.

    Raises:
        MergeError: The result is not finite.
    """
    stored, W, total = weight_with(layer, new, how)
    after, exact = _read_back(layer, stored), W + total
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
    return stored, SiteMerge(path, 1.0 if wanted == 0 else max(0.0, 1.0 - lost / wanted), changed, error)


def _read_back(layer: LoraLayer, stored: Any) -> Tensor:
    """What a merge stores, multiplied out again: (out, in)."""
    if isinstance(stored, nn.Module):
        row = base_of(stored)
        return row.read(stored, row.stored(stored, "weight"))
    return layer.base.read(layer.source, stored)


@dataclass(frozen=True)
class Built:
    """What a site's weight becomes, ready to be put in place.

    Attributes:
        stored: The thing to store, or a plain module for the place of a quantised one.
        kept: The original, where it is not left in a module that is replaced.
        own: A parameter of the site's own, where it shares one.
        keeps: Whether the original can be had back.
    """

    stored: Any
    kept: Any
    own: nn.Parameter | None
    keeps: bool


def built(layer: LoraLayer, stored: Any, keep_base: KeepBase, apart: bool) -> Built:
    """Make ready what a merge puts in place.

    Args:
        layer: The site's layer.
        stored: What `merged_weight` gave.
        keep_base: As in `merge`.
        apart: The site's parameter is another module's too, and the site gets its own.
    """
    kept = layer.kept
    if keep_base is not False and kept is None and not isinstance(stored, nn.Module):
        kept = layer.original()
        kept = kept.to("cpu") if keep_base == "cpu" and not layer.base.quantised else kept
    weight = layer.owner._parameters.get(layer.slot.parameter)
    own = None
    if apart and weight is not None and not layer.base.quantised and not isinstance(stored, nn.Module):
        own = nn.Parameter(stored, requires_grad=weight.requires_grad)
    return Built(stored, kept, own, keep_base is not False)


def place(layer: LoraLayer, stored: Any) -> None:
    """Put what a merge or its undoing stores where it belongs: a module in the owner's place, a weight into it."""
    if isinstance(stored, nn.Module):
        layer.replaced = layer.replaced or (layer.owner,)
        layer.base_layer = stored
        return
    layer.base.place(layer.source, layer.slot.parameter, stored)
    if layer.replaced:
        layer.base_layer, layer.replaced = layer.replaced[0], ()


def put(layer: LoraLayer, made: Built, names: Sequence[str]) -> None:
    """Put what was made ready in place; nothing here can refuse.

    Args:
        layer: The site's layer.
        made: What `built` gave.
        names: The adapters that are merged by it.
    """
    owner, parameter = layer.owner, layer.slot.parameter
    layer.kept = made.kept
    if made.own is not None:  # the other holder keeps the old one
        if made.keeps and layer.tied_weight is None:
            layer.tied_weight = owner._parameters[parameter]
        owner._parameters[parameter] = made.own
    else:
        place(layer, made.stored)
        if not made.keeps:
            layer.replaced = ()
    layer.merged_adapters = [*layer.merged_adapters, *names]


def give_back(owner: nn.Module, parameter: str, held: nn.Parameter, stored: Tensor) -> None:
    """Give a module the parameter again that it shared before a merge untied it.

    Args:
        owner: The module.
        parameter: The parameter's name there.
        held: What was set aside, of any shape; an earlier merge may have written to it, and it does not follow the
            model to another device or dtype.
        stored: What it shall hold, where the model is now.
    """
    same = (held.device, held.dtype) == (stored.device, stored.dtype) and torch.equal(held.detach(), stored)
    if not same:
        held.data = stored.detach()
    owner._parameters[parameter] = held
