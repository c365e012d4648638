"""PEFT's private names in `tuners_utils` that its users import all the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.errors import ConfigTypeError, warn_caller
from lorakit.peft import adapter_queries
from lorakit.peft.matching import ExcludedModule, find_minimal_target_modules, maybe_include_all_linear_layers


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters of a layer that are to be merged and are not yet.

    Args:
        module: An adapted layer.
        adapter_names: Which; None means the active ones.

    Raises:
        ConfigTypeError: The names are one string.
    """
    if isinstance(adapter_names, str):
        raise ConfigTypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    asked = list(module.active_adapters if adapter_names is None else adapter_names)
    merged = adapter_queries.merged_at(module)
    fresh = [name for name in asked if name not in merged]
    if merged:
        warn_caller(
            f"Already following adapters were merged {','.join(merged)}. You are now additionally merging "
            f"{','.join(fresh)}."
            if fresh
            else "All adapters are already merged, nothing to do."
        )
    return fresh


def filter_state_dict(state_dict: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    """The entries whose names are, or lie under, one of these prefixes."""
    return {key: value for key, value in state_dict.items() if _is_under(key, prefixes)}


def _is_under(key: str, prefixes: Collection[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def adapter_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Where the parameters of adapters lie in a model's state dict: of one adapter, or of all."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for attribute, held in module._modules.items():
                if attribute == "base_layer" or held is None:
                    continue
                where = f"{path}.{attribute}" if path else attribute
                if adapter_name is None:
                    found.add(where)
                elif adapter_name in held:  # type: ignore[operator]
                    found.add(f"{where}.{adapter_name}")
    return found


def in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """Width of a module's input and output, or None where it has none."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, module.out_channels
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


_NAMES: Mapping[str, Any] = {
    "_ExcludedModule": ExcludedModule,
    "_find_minimal_target_modules": find_minimal_target_modules,
    "_maybe_include_all_linear_layers": maybe_include_all_linear_layers,
    "_get_in_out_features": in_out_features,
    "_filter_state_dict_by_key_prefixes": filter_state_dict,
    "_get_tuner_state_dict_key_prefixes": adapter_prefixes,
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return _NAMES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
