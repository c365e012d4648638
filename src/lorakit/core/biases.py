"""The bias that an adapter brings with B (`lora_bias`), written into the base's by a merge and out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.core.bases import at_least_fp32
from lorakit.core.layer import LoraLayer
from lorakit.errors import MergeError


def brings_bias(layer: LoraLayer, names: Sequence[str]) -> bool:
    """Whether one of some adapters has a bias of its own at a site (`lora_bias`)."""
    return any(name in layer.r and layer.factor(name).bias is not None for name in names)


def bias_for(layer: LoraLayer, names: Sequence[str]) -> Tensor | None:
    """The base's bias, (out,), with those of adapters in it; None where nothing was or is written to it.

    Raises:
        MergeError: It would not be finite.
    """
    old = layer.original_bias()
    if old is None or not brings_bias(layer, names):
        return layer.kept_bias
    with torch.no_grad():
        total = at_least_fp32(old).clone()
        for name in names:
            factor = layer.factor(name)
            if factor.bias is not None:
                total += factor.bias.to(total.dtype) * factor.scale
        if not bool(torch.isfinite(total).all()):
            raise MergeError(
                f"NaNs detected in the merged weights: the bias of B of {', '.join(names)} is NaN or infinite. Nothing "
                "was changed."
            )
        return total.to(old.dtype)


def put_bias(layer: LoraLayer, bias: Tensor | None) -> None:
    """Put what `bias_for` made, (out,), in place; None leaves the bias alone."""
    if bias is None:
        return
    old = layer.original_bias()
    layer.kept_bias = None if bias is layer.kept_bias or old is None else old.detach()
    set_bias(layer.owner, bias)


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Make a tensor (out,) the bias of a module, whether that is a parameter of it or, as in HQQ, a mere attribute."""
    held = module._parameters.get("bias")
    if held is not None:
        held.data = bias
    else:
        module.__dict__["bias"] = bias
