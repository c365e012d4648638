"""The bias that an adapter brings with B (`lora_bias`), written into the base's by a merge and out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.bases import at_least_fp32
from lorakit.core.layering.layer import LoraLayer
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
        if layer.kept_bias is not None:
            layer.kept_bias = old  # as the base is now, which may have been cast
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


def check_place(path: str, layer: LoraLayer, names: Sequence[str]) -> None:
    """Refuse to write adapters' own biases where the base has none, or into one that another adapter trains in place.

    Raises:
        MergeError: The message names the site.
    """
    trainer = None if layer.old_bias is None else layer.old_bias[0]
    for name in names:
        if trainer is not None and name != trainer and brings_bias(layer, [name]):
            raise MergeError(
                f"Adapter {name!r} brings a bias of its own (lora_bias), and adapter {trainer!r} trains the base's at "
                f"{path}, so it cannot be merged. Detach {trainer!r} first."
            )
    if layer.original_bias() is None and brings_bias(layer, names):
        raise MergeError(
            f"Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: {path} has no "
            "place for the adapter's."
        )


def check_replaceable(model_layers: Iterable[tuple[str, LoraLayer]], names: Sequence[str], in_place: bool) -> None:
    """Refuse to put a dense module where an adapter trains the bias of the one that stands there.

    Args:
        model_layers: Paths and layers of a model.
        names: The adapters that shall be merged with dense=True.
        in_place: Adapters stay on the model.

    Raises:
        MergeError: The message names the adapter and the site.
    """
    for path, layer in model_layers:
        replaces = layer.base.quantised or layer.slot.groups > 1
        if layer.old_bias is None or not replaces or not any(name in layer.r for name in names):
            continue
        trainer = layer.old_bias[0]
        if in_place or trainer not in names:
            raise MergeError(
                f"dense=True puts another module at {path}, whose bias adapter {trainer!r} trains in place. Detach "
                f"{trainer!r} first, or merge with dense=False."
            )


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
