"""Small questions about what stands on a model, in PEFT's words: which adapters, which act, which are merged.

The answers come from `lorakit.core`; other files of this part ask here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.factor import TRAINED
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import find_state, walk


def is_wrapper(model: nn.Module) -> bool:
    """Whether a model is a `PeftModel`: it holds a tuner, which holds the user's model."""
    inner = model._modules.get("base_model")
    return inner is not None and hasattr(inner, "tuner_layer_cls")


def adapted(model: nn.Module) -> Iterator[AdapterModule]:
    """Every adapted layer and copied module."""
    return (module for _, module in walk(model) if isinstance(module, AdapterModule))


def configs_of(model: nn.Module) -> dict[str, LoraConfig]:
    """Adapter -> config; the live table, empty where there are no adapters."""
    state = find_state(model)
    return {} if state is None else state.configs


def holders_of(module: AdapterModule) -> Iterator[Any]:
    """The containers of a layer that hold something per adapter."""
    if isinstance(module, ModulesToSave):
        yield module.modules_to_save
    elif isinstance(module, TrainableTokens):
        yield module.token_adapter.trainable_tokens_delta
    for attribute in TRAINED:
        held = module._modules.get(attribute)
        if held is not None:
            yield held


def available_at(module: AdapterModule) -> set[str]:
    """Adapters that have something at a layer."""
    return set(module.available_adapters())


def active_at(module: AdapterModule) -> list[str]:
    """Adapters that act at a layer, also while they are disabled, as PEFT lists them."""
    return module.active_adapters


def merged_at(module: AdapterModule) -> list[str]:
    """Adapters that are merged at a layer."""
    return list(getattr(module, "merged_adapters", ()))


def is_disabled(module: AdapterModule) -> bool:
    """Whether a layer's adapters are switched off now."""
    return module.disable_adapters


BACKENDS = {"bnb-4bit": "bnb 4bit", "bnb-8bit": "bnb 8bit"}
"""Name of a row of BASES -> PEFT's word for it, where it has another."""


def quantisation_at(module: AdapterModule) -> str | None:
    """How a layer's base weight is quantised, in PEFT's words, or None."""
    if not isinstance(module, LoraLayer) or not module.base.quantised:
        return None
    return BACKENDS.get(module.base.name, module.base.name)


def rows_per_prompt(kwargs: Mapping[str, Any], model: nn.Module) -> int:
    """How many rows `generate` makes of each prompt: beams, or sequences to return.

    Args:
        kwargs: What `generate` was given.
        model: The user's model.
    """
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    found = [kwargs.get(word) or getattr(config, word, None) or 1 for word in ("num_beams", "num_return_sequences")]
    return max(int(number) for number in found)
