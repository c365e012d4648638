"""Queries about the adapters on a model, answered by `lorakit.core`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.factor import TRAINED
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import find_state, walk
from lorakit.core.variants import own_tensors


def is_wrapper(model: nn.Module) -> bool:
    """Return whether a model is a `PeftModel`: it holds a tuner, which holds the user's model."""
    inner = model._modules.get("base_model")
    return inner is not None and hasattr(inner, "tuner_layer_cls")


def user_model(model: Any) -> nn.Module:
    """Return the user's model inside a wrapper, or the model itself."""
    inner: nn.Module = model.get_base_model() if is_wrapper(model) else model
    return inner


def adapted(model: nn.Module) -> Iterator[AdapterModule]:
    """Iterate over adapted layers, saved modules and trainable tokens."""
    return (module for _, module in walk(model) if isinstance(module, AdapterModule))


def configs_of(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the dictionary of configs by adapter; empty without adapters."""
    state = find_state(model)
    return {} if state is None else state.configs


def holders_of(module: AdapterModule) -> Iterator[Any]:
    """Iterate over the containers of a layer that hold modules or parameters by adapter."""
    if isinstance(module, ModulesToSave):
        yield module.modules_to_save
    elif isinstance(module, TrainableTokens):
        yield module.token_adapter.trainable_tokens_delta
    for attribute in (*TRAINED, *(tensor.held_as for tensor in own_tensors())):
        held = module._modules.get(attribute)
        if held is not None:
            yield held


def merged_at(module: AdapterModule) -> list[str]:
    """Return the adapters that are merged at a layer."""
    return list(getattr(module, "merged_adapters", ()))


def merged_adapters(model: nn.Module) -> list[str]:
    """Return the sorted names of adapters that are merged at some layer."""
    return sorted({name for module in adapted(model) for name in merged_at(module)})


def rows_per_prompt(kwargs: Mapping[str, Any], model: nn.Module) -> int:
    """Return the number of rows of `generate` for each prompt: beams, or sequences to return.

    Args:
        kwargs: Arguments of `generate`.
        model: The user's model.
    """
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    found = [kwargs.get(word) or getattr(config, word, None) or 1 for word in ("num_beams", "num_return_sequences")]
    return max(int(number) for number in found)
