"""Which parameters are trained: adapters by name, and everything else as it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from lorakit.core.activation import parameters_by_adapter
from lorakit.peft import standing


def set_trained(model: nn.Module, name: str, trained: bool) -> None:
    """Train one adapter, or freeze it.

    Args:
        model: A model with adapters in it.
        name: The adapter.
        trained: Whether its parameters require gradients.
    """
    for parameter in parameters_by_adapter(model, [name])[name]:
        parameter.requires_grad_(trained and parameter.is_floating_point())


def train_only(model: nn.Module, names: Collection[str]) -> None:
    """Train these adapters and freeze the others.

    Args:
        model: A model with adapters in it.
        names: The adapters to train.
    """
    for name, parameters in parameters_by_adapter(model, standing.configs_of(model)).items():
        for parameter in parameters:
            parameter.requires_grad_(name in names and parameter.is_floating_point())


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train adapters, or freeze them, whatever is active.

    Args:
        model: A model with adapters in it.
        adapter_names: One name or several; one that is not there is passed over, as PEFT does.
        requires_grad: Train them.
    """
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        if name in standing.configs_of(model):
            set_trained(model, name, requires_grad)
