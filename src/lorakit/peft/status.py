"""PEFT's functions that report the status of a model and of its layers, and their result types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import walk
from lorakit.errors import AdapterError
from lorakit.peft import model_adapters

T = TypeVar("T")
Irregular = Literal["irregular"]
IRREGULAR: Irregular = "irregular"
"""Value of a field that differs between layers."""


@dataclass
class TunerLayerStatus:
    """Status of an adapted layer or a saved module, as in PEFT; dicts are keyed by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """Status of a model, as in PEFT; a field is "irregular" if it differs between layers."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


MODULE_TYPES = {"ModulesToSave": "ModulesToSaveWrapper", "TrainableTokens": "TrainableTokensLayer"}
"""PEFT's names for the classes of adapted modules that are not layers, keyed by lorakit's names."""


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of every adapted layer and saved module.

    Raises:
        AdapterError: The model has no adapters.
    """
    inner = getattr(model, "base_model", model) if model_adapters.is_wrapper(model) else model
    found = [
        _layer_status(f"{name}.token_adapter" if isinstance(module, TrainableTokens) else name, module)
        for name, module in walk(inner)
        if isinstance(module, AdapterModule)
    ]
    if not found:
        text = "No adapter layers found in the model; add an adapter with get_peft_model or inject_adapter_in_model."
        raise AdapterError(text, field="model")
    return found


def _layer_status(name: str, module: AdapterModule) -> TunerLayerStatus:
    backend = getattr(module, "quantization_backend", None)
    weight_format = module.base.name if isinstance(module, LoraLayer) and module.base.quantized else None
    flags, devices = _flags_and_devices([module])
    return TunerLayerStatus(
        name=name,
        module_type=MODULE_TYPES.get(type(module).__name__) or repr(module).partition("(")[0],
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=list(module.merged_adapters),
        requires_grad=flags,
        available_adapters=sorted(set(module.available_adapters())),
        devices=devices,
        quantization_backend=weight_format if backend is None else str(backend.backend_name),
    )


def _flags_and_devices(modules: Iterable[AdapterModule]) -> tuple[dict[str, bool | Irregular], dict[str, list[str]]]:
    """Return two dicts with an entry for each adapter: whether its parameters are trainable, and their device types."""
    held: dict[str, list[nn.Parameter]] = defaultdict(list)
    for module in modules:
        table = module.token_adapter if isinstance(module, TrainableTokens) else None  # tied modules have no rows
        for adapter in module.available_adapters():
            found = module.parameters_of(adapter) if table is None else [table.trainable_tokens_delta[adapter]]
            for parameter in found:  # empty for a tied layer or a module copy without parameters
                held[adapter].append(parameter)
    flags = {adapter: _common(parameter.requires_grad for parameter in found) for adapter, found in held.items()}
    return flags, {adapter: sorted({one.device.type for one in found}) for adapter, found in held.items()}


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of a model that has adapters."""
    wrapped = model_adapters.is_wrapper(model)
    found = get_layer_status(model)
    user = model_adapters.user_model(model)
    known = wrapped or hasattr(user, "get_output_embeddings")
    flags, devices = _flags_and_devices(model_adapters.adapted(user))
    trained, total = model_adapters.count_parameters(model)
    return TunerModelStatus(
        base_model_type=type(user).__name__ if known else "other",
        adapter_model_type=type(model.get_submodule("base_model")).__name__ if wrapped else "None",
        peft_types=dict.fromkeys(model_adapters.configs_of(user), "LORA") if wrapped else {},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(found),
        enabled=_common(status.enabled for status in found),
        active_adapters=_common(status.active_adapters for status in found),
        merged_adapters=_merged(found),
        requires_grad=flags,
        available_adapters=sorted({name for status in found for name in status.available_adapters}),
        devices=devices,
        quantization_backend=_common(status.quantization_backend for status in found),
    )


def _common(values: Iterable[T]) -> T | Irregular:
    """Return the common value if all values are equal, else "irregular"."""
    first, *others = values
    return first if all(value == first for value in others) else IRREGULAR


def _merged(found: list[TunerLayerStatus]) -> list[str] | Irregular:
    merged = {name for status in found for name in status.merged_adapters}
    partly = any(merged & (set(status.available_adapters) - set(status.merged_adapters)) for status in found)
    return IRREGULAR if partly else sorted(merged)
