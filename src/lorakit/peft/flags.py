"""Which parameters are trained: adapters by name, and everything else as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from lorakit import core
from lorakit.core.layering.sitemap import find_state


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
