"""Layer attributes and methods from PEFT's API that lorakit's layers do not define themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.factor import TRAINED
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import find_state
from lorakit.core.variants import asked_for, own_tensors, variant_named


def _of_variants(layer: LoraLayer, word: str) -> dict[str, object]:
    """Return a dict from adapter to a variant-specific value, which is False if the adapter uses another variant."""
    found: dict[str, object] = {}
    for name, variant in layer.variant.items():
        value = variant_named(variant).peft_names.get(word)
        found[name] = value is not None and value(layer.factor(name))
    return found


def _use_rslora(layer: LoraLayer) -> dict[str, bool]:
    configs = layer.state.configs
    return {name: name in configs and configs[name].use_rslora for name in layer.r}


def _frozen(layer: LoraLayer) -> dict[str, tuple[str, ...]]:
    """Return a dict from adapter to the names of the factors frozen by its init (MiCA); empty entries are omitted."""
    parts = list(zip("AB", layer.kind.names, strict=True))
    return {
        name: tuple(held for part, held in parts if part not in trains)
        for name, trains in layer.trains.items()
        if len(trains) < len(parts)
    }


def supports_conversion(layer: LoraLayer, adapter_name: str = "default") -> bool:
    """Return whether an adapter on a layer can be converted to plain LoRA."""
    if adapter_name not in layer.r:
        return True
    variant = variant_named(layer.variant[adapter_name])
    return variant.update is not None and variant.move is None


def _cast_input(layer: LoraLayer, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast an input of any shape, as PEFT does before applying A; lorakit's forward pass casts inputs automatically."""
    return x if x is None or not layer.cast_input_dtype_enabled else x.to(dtype)


def _adapter_layer_names(layer: LoraLayer) -> tuple[str, ...]:
    """Return the names of the attributes that store the adapters' parameters."""
    return tuple(name for name in (*TRAINED, *(own.held_as for own in own_tensors())) if name in layer._modules)


VALUES: Mapping[str, Callable[[LoraLayer], object]] = {
    "use_rslora": _use_rslora,
    "lora_bias": lambda layer: {name: layer.bias_of(name) is not None for name in layer.r},
    "frozen_peft_weight_names": _frozen,
    "adapter_layer_names": _adapter_layer_names,
    "other_param_names": lambda _: ("r", "lora_alpha", "scaling", "lora_dropout"),
    "cast_input_dtype_enabled": lambda _: True,
}
"""Functions that compute a layer's PEFT attributes, keyed by name; a value set on the layer itself takes precedence."""

METHODS: Mapping[str, Callable[..., object]] = {
    "supports_lora_conversion": supports_conversion,
    "_all_available_adapter_names": lambda layer: sorted(layer.available_adapters()),
    "_cast_input_dtype": _cast_input,
}
"""Implementations of PEFT's methods, keyed by name; each takes the layer as its first argument."""


NAMES_OF_VARIANTS = frozenset(word for variant in asked_for() for word in variant.peft_names)
"""PEFT's names for the dictionaries that show which variant each adapter uses."""


class PeftLayerMethods:
    """Stateless lookup of PEFT-only layer attributes and methods."""

    names: ClassVar[frozenset[str]] = frozenset((*VALUES, *METHODS, *NAMES_OF_VARIANTS))

    def answer(self, layer: nn.Module, word: str) -> object:
        """Return a PEFT-only attribute or method of a layer.

        Args:
            layer: An adapted layer.
            word: Name of the attribute or method, one of those in `names`.
        """
        assert isinstance(layer, LoraLayer)  # only adapted layers call this
        if word in VALUES:
            return VALUES[word](layer)
        return partial(METHODS[word], layer) if word in METHODS else _of_variants(layer, word)


def answer_as_peft(model: nn.Module) -> None:
    """Enable PEFT-only attributes on the layers of a model; do nothing if the model has no adapters."""
    state = find_state(model)
    if state is not None and state.peft_methods is None:
        state.peft_methods = PeftLayerMethods()
