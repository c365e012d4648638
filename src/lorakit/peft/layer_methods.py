"""Layer attributes and methods from PEFT's API that lorakit's layers do not define themselves.

PEFT's classes of variants, such as `DoraLinearVariant`, are for `isinstance` checks of a layer's `lora_variant`, an
entry of `lorakit.core.variants`, which is an instance of the classes that have its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.config.types import Value
from lorakit.core.attachment.attaching import put_fresh_factor, reset_factor
from lorakit.core.factor import TRAINED
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import find_state
from lorakit.core.variants import Variant, own_tensors, variant_named
from lorakit.core.variants.velora import PROJECTION
from lorakit.errors import NotYetSupported, warn_caller
from lorakit.peft.placeholders import PeftWarning
from lorakit.peft.utilities import resolve_quantization_backend


def _velora_initialized(layer: LoraLayer) -> dict[str, bool]:
    variants = layer.variant.items()
    return {name: of == "velora" and bool(layer.factor(name).own[PROJECTION].any()) for name, of in variants}


def _use_rslora(layer: LoraLayer) -> dict[str, bool]:
    configs = layer.state.configs
    return {name: name in configs and configs[name].use_rslora for name in layer.r}


def supports_conversion(layer: LoraLayer, adapter_name: str = "default") -> bool:
    """Return whether an adapter on a layer can be converted to plain LoRA."""
    if adapter_name not in layer.r:
        return True
    variant = variant_named(layer.variant[adapter_name])
    return variant.is_mergeable and variant.move is None


def _cast_input(layer: LoraLayer, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast an input of any shape, as PEFT does before applying A; lorakit's forward pass casts inputs automatically."""
    return x if x is None or not layer.cast_input_dtype_enabled else x.to(dtype)


def _variants_of(layer: LoraLayer) -> dict[str, Variant]:
    """Return a dict from adapter to variant; adapters that are plain LoRA have no entry."""
    found = {name: variant_named(variant) for name, variant in layer.variant.items()}
    return {name: variant for name, variant in found.items() if variant.field}


def reset_lora_parameters(layer: LoraLayer, adapter_name: str, init_lora_weights: bool | str) -> None:
    """Initialize an adapter's factors in a layer again; see `reset_factor`."""
    reset_factor(layer, adapter_name, init_lora_weights)


def update_layer(
    layer: LoraLayer, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Value
) -> None:
    """Give a layer new factors for an adapter, trainable if the adapter is active here, and replace existing ones.

    If the model has no such adapter, a copy of `config` is added to its configs. `target_name` is the layer's path;
    PEFT's other options have no effect.
    """
    put_fresh_factor(layer, adapter_name, config, r, lora_alpha, str(kwargs.get("target_name") or ""))
    layer.set_trained(adapter_name, adapter_name in layer.active_adapters and not config.inference_mode)
    if config.lora_bias and layer.original_bias() is None:
        text = f"`lora_bias=True` was passed but the targeted layer of type {type(layer.owner).__name__} has no bias"
        warn_caller(f"{text}, so adapter {adapter_name!r} cannot be merged there.", PeftWarning)


def _to_base(layer: LoraLayer, adapter_name: str, device: torch.device | None = None) -> None:
    """Move an adapter's tensors here to a device, by default that of the base weight, and to the base's float dtype."""
    stored = layer.base.tensors(layer.original())[0]
    target, dtype = device or stored.device, stored.dtype if stored.is_floating_point() else None
    for parameter in layer.parameters_of(adapter_name):
        if not parameter.is_meta:
            parameter.data = parameter.data.to(target, dtype if parameter.is_floating_point() else None)


def _adapter_layer_names(layer: LoraLayer) -> tuple[str, ...]:
    """Return the names of the attributes that store the adapters' parameters."""
    return tuple(
        name for name in dict.fromkeys((*TRAINED, *(own.container for own in own_tensors()))) if name in layer._modules
    )


VALUES: Mapping[str, Callable[[LoraLayer], object]] = {
    "use_rslora": _use_rslora,
    "use_dora": lambda layer: {name: variant == "dora" for name, variant in layer.variant.items()},
    "lora_velora_initialized": _velora_initialized,
    "lora_bias": lambda layer: {name: layer.bias_of(name) is not None for name in layer.r},
    "adapter_layer_names": _adapter_layer_names,
    "other_param_names": lambda _: ("r", "lora_alpha", "scaling", "lora_dropout"),
    "lora_variant": _variants_of,
    "quantization_backend": lambda layer: resolve_quantization_backend(layer.owner),
}
"""Functions that compute a layer's PEFT attributes, keyed by name; a value set on the layer itself takes precedence."""

METHODS: Mapping[str, Callable[..., object]] = {
    "supports_lora_conversion": supports_conversion,
    "reset_lora_parameters": reset_lora_parameters,
    "update_layer": update_layer,
    "_all_available_adapter_names": lambda layer: sorted(layer.available_adapters()),
    "_cast_input_dtype": _cast_input,
    "_move_adapter_to_device_of_base_layer": _to_base,
}
"""Implementations of PEFT's methods, keyed by name; each takes the layer as its first argument."""


class PeftLayerMethods:
    """Stateless lookup of PEFT-only layer attributes and methods."""

    names: ClassVar[frozenset[str]] = frozenset((*VALUES, *METHODS))

    def answer(self, layer: nn.Module, word: str) -> object:
        """Return a PEFT-only attribute or method of a layer."""
        assert isinstance(layer, LoraLayer)  # only adapted layers call this
        return VALUES[word](layer) if word in VALUES else partial(METHODS[word], layer)


def answer_as_peft(model: nn.Module) -> None:
    """Enable PEFT-only attributes on the layers of a model; do nothing if the model has no adapters."""
    state = find_state(model)
    if state is not None and state.peft_methods is None:
        state.peft_methods = PeftLayerMethods()


class _VariantType(type):
    """Metaclass whose classes have the entry of one variant as their only instance."""

    variant: ClassVar[str]

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, Variant) and value.name == cls.variant

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        text = f"{cls.__name__} cannot be instantiated; select the variant with a field of LoraConfig."
        raise NotYetSupported(text, what=cls.__name__)


def _type(name: str, variant: str) -> _VariantType:
    about = f"PEFT's class of the variant {variant!r}; the variant's entry is its only instance."
    return _VariantType(name, (), {"variant": variant, "__doc__": about, "__module__": __name__})


ALoraLinearVariant = _type("ALoraLinearVariant", "alora")
ArrowLinearVariant = _type("ArrowLinearVariant", "arrow-router")
BdLoraLinearVariant = _type("BdLoraLinearVariant", "bdlora")
DoraConv1dVariant = _type("DoraConv1dVariant", "dora")
DoraConv2dVariant = _type("DoraConv2dVariant", "dora")
DoraConv3dVariant = _type("DoraConv3dVariant", "dora")
DoraEmbeddingVariant = _type("DoraEmbeddingVariant", "dora")
DoraLinearVariant = _type("DoraLinearVariant", "dora")
KasaLinearVariant = _type("KasaLinearVariant", "kasa")
MontecloraLinearVariant = _type("MontecloraLinearVariant", "monteclora")
QALoraLinearVariant = _type("QALoraLinearVariant", "qalora")
VeloraLinearVariant = _type("VeloraLinearVariant", "velora")
