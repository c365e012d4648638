"""The dtype of factors: raised to fp32 where they are narrower, or that of the base's own weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lorakit.core.layer import LoraLayer
from lorakit.peft import standing

NARROW = (torch.float16, torch.bfloat16)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Raise an adapter's half-precision factors to fp32.

    Args:
        model: A model with adapters in it.
        adapter_name: The adapter.
        autocast_adapter_dtype: False does nothing.
    """
    if autocast_adapter_dtype:
        for _, parameter in _factors(model, adapter_name):
            if parameter.dtype in NARROW or parameter.element_size() == 1:
                parameter.data = parameter.data.float()


def cast_to_base(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter's factors the dtype of the base weight that they stand beside, where that is a float.

    Args:
        model: A model with adapters in it.
        adapter_name: The adapter.
    """
    for layer, parameter in _factors(model, adapter_name):
        weight = layer.owner._parameters.get(layer.slot.parameter)
        if weight is not None and weight.is_floating_point():
            parameter.data = parameter.data.to(weight.dtype)


def _factors(model: nn.Module, adapter: str) -> Iterator[tuple[LoraLayer, nn.Parameter]]:
    for layer in standing.adapted(model):
        if isinstance(layer, LoraLayer):
            for holder in standing.holders_of(layer):
                if adapter in holder:
                    held = holder[adapter]
                    for parameter in held.parameters() if isinstance(held, nn.Module) else [held]:
                        yield layer, parameter
