"""The dtype of factors: raised to fp32 where they are narrower, or that of the base's own weight.

Which parameters are trained: adapters by name, and everything else as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import find_state
from lorakit.peft import adapter_queries

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
    for layer in adapter_queries.adapted(model):
        for holder in adapter_queries.holders_of(layer) if isinstance(layer, LoraLayer) else ():
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
    for layer in adapter_queries.adapted(model):
        if isinstance(layer, LoraLayer):
            for holder in adapter_queries.holders_of(layer):
                if adapter in holder:
                    held = holder[adapter]
                    for parameter in held.parameters() if isinstance(held, nn.Module) else [held]:
                        yield layer, parameter


def set_trained(model: nn.Module, name: str, trained: bool) -> None:
    """Train one adapter, or freeze it; what its init says is never trained stays frozen.

    Args:
        model: A model with adapters in it.
        name: The adapter; one that is not there is no matter.
        trained: Whether its parameters require gradients.
    """
    core.set_trained(model, {name: trained})


def train_only(model: nn.Module, names: Collection[str]) -> None:
    """Train these adapters and freeze the others.

    Args:
        model: A model with adapters in it.
        names: The adapters to train.
    """
    core.set_trained(model, dict.fromkeys(names, True), others=False)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train adapters, or freeze them, whatever is active.

    Args:
        model: A model with adapters in it.
        adapter_names: One name or several; one that is not there is passed over, as PEFT does.
        requires_grad: Train them.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    core.set_trained(model, dict.fromkeys(names, requires_grad))


def pause(model: nn.Module) -> list[nn.Parameter]:
    """Freeze every adapter for a while.

    Args:
        model: A model with adapters in it.

    Returns:
        The parameters, (…), that were trained.
    """
    state = find_state(model)
    trained = [
        parameter
        for module in (() if state is None else state.members())
        for name in module.available_adapters()
        for parameter in module.parameters_of(name)
        if parameter.requires_grad
    ]
    for parameter in trained:
        parameter.requires_grad_(False)
    return trained


@contextlib.contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """A block in which a model is its original base, and its adapters are frozen, as PEFT shows it.

    The flags belong to all threads. So they are only touched where gradients are recorded: threads that serve leave
    one that trains alone. Adapters that become active within the block keep the flags that this gave them.

    Args:
        model: A model; one without adapters is left alone.

    Yields:
        Nothing.
    """
    state = find_state(model)
    if state is None:
        yield
        return
    before = set(state.chosen.names)
    trained = pause(model) if torch.is_grad_enabled() else []
    try:
        with core.disable(model):
            yield
    finally:
        for parameter in trained if before <= set(state.chosen.names) else ():
            parameter.requires_grad_(True)
