"""The dtype of factors: raised to fp32 where they are narrower, or that of the base's own weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorakit.core.layering.layer import LoraLayer
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


def empty(model: nn.Module, adapter_name: str) -> None:
    """Leave an adapter's factors without memory, on torch's meta device.

    Args:
        model: A model with adapters in it.
        adapter_name: The adapter.
    """
    for layer in standing.adapted(model):
        for holder in standing.holders_of(layer) if isinstance(layer, LoraLayer) else ():
            if adapter_name in holder:
                held = holder[adapter_name]
                if isinstance(held, nn.Module):
                    held.to("meta")
                else:
                    holder[adapter_name] = nn.Parameter(held.to("meta"), held.requires_grad)


def fill(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give factors that have no memory their numbers, where the weight that they stand beside lies.

    Args:
        model: A model with adapters in it.
        adapter_name: The adapter.
        tensors: Name in the model -> tensor (…), for those without memory.
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        layer = model.get_submodule(path.partition(".lora_")[0])
        device = layer.base.device(layer.owner, layer.slot.parameter) if isinstance(layer, LoraLayer) else "cpu"
        old = owner._parameters[leaf]
        flag = old is not None and old.requires_grad
        owner._parameters[leaf] = nn.Parameter(tensor.detach().to(device, copy=True), flag)


def _factors(model: nn.Module, adapter: str) -> Iterator[tuple[LoraLayer, nn.Parameter]]:
    for layer in standing.adapted(model):
        if isinstance(layer, LoraLayer):
            for holder in standing.holders_of(layer):
                if adapter in holder:
                    held = holder[adapter]
                    for parameter in held.parameters() if isinstance(held, nn.Module) else [held]:
                        yield layer, parameter
