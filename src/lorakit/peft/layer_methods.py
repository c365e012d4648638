"""Attributes that programs read from PEFT's layers and that only PEFT has; every one is derived from the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.core.factor import TRAINED
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import find_state


def _use_dora(layer: LoraLayer) -> dict[str, bool]:
    return {name: variant == "dora" for name, variant in layer.variant.items()}


def _use_rslora(layer: LoraLayer) -> dict[str, bool]:
    configs = layer.state.configs
    return {name: name in configs and configs[name].use_rslora for name in layer.r}


def _lora_bias(layer: LoraLayer) -> dict[str, bool]:
    return {name: layer.bias_of(name) is not None for name in layer.r}


def _frozen(layer: LoraLayer) -> dict[str, tuple[str, ...]]:
    """Adapter -> attributes whose values its init froze (MiCA); others are not in it."""
    parts = list(zip("AB", layer.kind.names, strict=True))
    return {
        name: tuple(held for part, held in parts if part not in trains)
        for name, trains in layer.trains.items()
        if len(trains) < len(parts)
    }


def _supports_conversion(layer: LoraLayer, adapter_name: str = "default") -> bool:
    """Return whether an adapter's update here can be written as plain LoRA."""
    return layer.variant.get(adapter_name, "plain") != "alora"


def _cast_input(layer: LoraLayer, x: Any, dtype: torch.dtype) -> Any:
    """PEFT's step before A, of any shape; the arithmetic here casts by itself."""
    return x if x is None or not layer.cast_input_dtype_enabled else x.to(dtype)


def _sorted_adapters(layer: LoraLayer) -> list[str]:
    return sorted(layer.available_adapters())


VALUES: Mapping[str, Callable[[LoraLayer], object]] = {
    "use_dora": _use_dora,
    "use_rslora": _use_rslora,
    "lora_bias": _lora_bias,
    "frozen_peft_weight_names": _frozen,
    "adapter_layer_names": lambda layer: tuple(name for name in TRAINED if name in layer._modules),
    "other_param_names": lambda _: ("r", "lora_alpha", "scaling", "lora_dropout"),
    "cast_input_dtype_enabled": lambda _: True,
}
"""Attribute -> its value. Setting one of them on a layer hides what is derived here."""

METHODS: Mapping[str, Callable[..., object]] = {
    "supports_lora_conversion": _supports_conversion,
    "_all_available_adapter_names": _sorted_adapters,
    "_cast_input_dtype": _cast_input,
}
"""Method -> what it does with the layer."""


class PeftLayerMethods:
    """Answers PEFT's own attributes of a layer; it has no state."""

    names: ClassVar[frozenset[str]] = frozenset((*VALUES, *METHODS))

    def answer(self, layer: nn.Module, word: str) -> object:
        """Return the value of an attribute, or a method of PEFT that belongs to a layer.

        Args:
            layer: An adapted layer.
            word: One of `names`.
        """
        assert isinstance(layer, LoraLayer)  # no other module asks
        return VALUES[word](layer) if word in VALUES else partial(METHODS[word], layer)


def answer_as_peft(model: nn.Module) -> None:
    """Let the layers of an adapted model answer PEFT's own attributes; one without adapters has no such layers."""
    state = find_state(model)
    if state is not None and state.peft_methods is None:
        state.peft_methods = PeftLayerMethods()
