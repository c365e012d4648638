"""Hooks on the modules that hold A and B: if there are any, the modules are called, so that the hooks run.

Otherwise A and B are only read, because that takes less time and memory. Only the factors of dense layers can be
called, for variants that multiply the stored A and B; the hooks of all others do not run. Hooks of DeepSpeed
ZeRO-3 free A and B after the call, so they are not called for variants that read A and B again, such as DoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.core.clones import is_watched
from lorakit.core.factor import FactorWeight
from lorakit.core.kinds.linear import linear_down
from lorakit.core.layers.stored_weight import StoredWeight
from lorakit.core.shards import is_freed_by_zero
from lorakit.core.variants import variant_named


def called_factors(layer: StoredWeight, name: str) -> tuple[nn.Module, nn.Module] | None:
    """Return the modules that hold A and B of an adapter if they must be called because one of them has a hook."""
    kind = layer.kind
    if kind.down is not linear_down:
        return None
    down, up = (layer._modules[attribute]._modules[name] for attribute in kind.names)
    if type(down) is not FactorWeight or type(up) is not FactorWeight or not (is_watched(down) or is_watched(up)):
        return None
    variant = variant_named(layer.variant[name])
    if variant.output is not None and is_freed_by_zero(down.weight):
        return None
    return (down, up) if variant.factors is None and variant.down is None else None


def called_product(layer: StoredWeight, name: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return s·B(A(x)), (…, out), including the bias of B, for x (…, in), if A and B must be called, else None.

    As in PEFT, x is cast to the dtype of A first, unless `layer.cast_input_dtype_enabled` is false.
    """
    called = called_factors(layer, name)
    if called is None:
        return None
    down, up = called
    h = down(x.to(down.get_parameter("weight").dtype) if layer.cast_input_dtype_enabled else x)
    product: Tensor = up(h)
    return product.to(dtype) * layer.scaling[name]
