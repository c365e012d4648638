"""Whether a merge is exact: whether the merged model says what base and adapters say, but for roundings.

It reads the model and changes nothing. What a merge that is not exact loses, `SiteMerge` measures.
"""

from __future__ import annotations

import torch
from torch import nn

from lorakit.core.layering.sitemap import layers, state_of
from lorakit.core.making.checks import check_known
from lorakit.core.merging.checks import check_mergeable
from lorakit.core.merging.rows import check_rows
from lorakit.errors import MergeError

WIDE = (torch.float32, torch.float64)
"""The dtypes of a base in which a merge is exact: those in which its sum is made anyway."""


def why_merge_is_inexact(model: nn.Module, *names: str) -> str | None:
    """Why merging adapters would change what the model says, or None where the merge is exact.   [docs/math.md (12)]

    Exact means: in eval mode, outputs are equal within roundings of the dtype in which the base computes. (W + ΔW)·x
    and W·x + ΔW·x are then the same sum in another order. That is so where every weight with a factor of these
    adapters is a plain one in fp32 or wider, so that the sum of (11), which is made in that dtype, is stored as it is.
    In bf16 and fp16 the stored weight loses what lies below its own roundings, and a quantised one far more. It does
    not hold for products that round the weight once more, as under autocast or with TF32.

    Args:
        model: An adapted model; it is left alone.
        names: Adapters; none means those of the default route.

    Returns:
        A sentence that names the site and the dtype, or why there can be no merge at all; None where it is exact.

    Raises:
        AdapterError: There is no such adapter.
    """
    state = state_of(model)
    chosen = tuple(names or state.default.names)
    check_known(state, chosen)
    try:
        check_mergeable(model, chosen, untie=False)
        check_rows(model, chosen, untie=False)
    except MergeError as refusal:
        return str(refusal)
    for path, layer in layers(model):
        if not any(name in layer.r for name in chosen):
            continue
        if layer.base.quantised:
            return (
                f"{path} is stored as {layer.base.name}, and storing the merged weight so would lose most of what an "
                "adapter adds."
            )
        dtype = layer.original().dtype
        if dtype not in WIDE:
            return (
                f"{path} is {str(dtype).removeprefix('torch.')}, and a merged weight loses what lies below the "
                "roundings of that precision. In float32 a merge is exact."
            )
        if layer.slot.groups > 1:
            return (
                f"{path} is a convolution of {layer.slot.groups} groups, whose weight has no place for what its "
                "adapter adds."
            )
    return None
