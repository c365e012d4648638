"""Check that an adapter's numbers fit the dtypes of a base: what is finite on file must not become infinite there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.attachment.build import NewFactor
from lorakit.core.attachment.fitting import Fit
from lorakit.core.files.judging import largest_value
from lorakit.core.layers.modules_to_save import Extras, ModulesToSave
from lorakit.core.model.index import AdapterIndex, Place

WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes in which a base computes; a weight stored in another one is computed with in fp32."""


def out_of_range(
    tensors: Mapping[str, Tensor],
    largest: Mapping[str, float],
    fitted: Fit,
    index: AdapterIndex,
    factors: Sequence[NewFactor],
    extras: Extras,
) -> list[str]:
    """Return what would be infinite in the base's dtype, in words.

    Args:
        tensors: Name on disk -> tensor (…).
        largest: Name on disk -> its largest magnitude.
        fitted: Where they go.
        index: The model's map.
        factors: The factors that were made of them, in the order of the sites.
        extras: The copies and biases that they fill.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    found = []
    for name, dtype in _uses(names, fitted, index, extras):
        limit = torch.finfo(dtype).max
        if limit < largest[name] < math.inf:
            found.append(f"{name} holds {largest[name]:g}, beyond {_named(dtype)} (at most {limit:g})")
    for new, (place, held) in zip([] if found else factors, fitted.sites.values(), strict=not found):
        dtype, sizes = _dtype_at(index, place), [largest[names[id(held[side])]] for side in "AB"]
        if _product_overflows(new, sizes, torch.finfo(dtype).max):
            found.append(f"scale·B·A at {place.path} is beyond {_named(dtype)}")
    return found


def copied_tensors(extras: Extras, fitted: Fit, index: AdapterIndex) -> Iterator[tuple[Tensor, str]]:
    """Yield each tensor (…) of the saved modules with the name of the tensor that fills it."""
    for path, duplicate in extras.copies.items():
        standing = index.modules[path]
        original = standing.original_module if isinstance(standing, ModulesToSave) else standing
        for leaf, own in duplicate.state_dict(keep_vars=True).items():
            key = fitted.copied.get((id(original), leaf))
            if key is not None:
                yield own, key


def filled_biases(extras: Extras, fitted: Fit) -> Iterator[tuple[nn.Module, str, Tensor, str]]:
    """Yield each trained bias: module, name, the tensor (out,) it has now, name of the tensor that fills it."""
    for module, originals in extras.biases:
        for leaf, old in originals.items():
            key = fitted.biases.get((id(module), leaf))
            if key is not None:
                yield module, leaf, old, key


def _uses(
    names: Mapping[int, str], fitted: Fit, index: AdapterIndex, extras: Extras
) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the name of each tensor with the dtype that its numbers have to fit."""
    for place, parts in fitted.sites.values():
        dtype = _dtype_at(index, place)
        for tensor in parts.values():
            yield names[id(tensor)], dtype
    for own, name in copied_tensors(extras, fitted, index):
        if own.is_floating_point():
            yield name, own.dtype
    for _, _, old, name in filled_biases(extras, fitted):
        yield name, old.dtype
    for chosen, name in fitted.rows:
        yield name, _computed(index.base(chosen.path).weight)


def _dtype_at(index: AdapterIndex, place: Place) -> torch.dtype:
    return _computed(getattr(index.holder(place), place.slot.parameter, None))


def _computed(weight: object) -> torch.dtype:
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in WIDTHS else torch.float32


def _product_overflows(new: NewFactor, sizes: Sequence[float], limit: float) -> bool:
    """Return whether scale·B·A goes beyond a limit; the product is only made if A and B are as large as that needs."""
    factor, by = new.factor, abs(new.factor.scale)
    most = by * factor.A.shape[0] * math.prod(sizes)
    if factor.A.is_meta or not all(map(math.isfinite, sizes)) or most <= limit:
        return False
    delta = new.place.kind.delta(new.place.slot, factor.A.detach().double(), factor.B.detach().double())
    return by * largest_value(delta) > limit


def _named(dtype: torch.dtype) -> str:
    return f"the base's {str(dtype).removeprefix('torch.')}"
