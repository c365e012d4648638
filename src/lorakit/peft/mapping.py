"""PEFT's tables from method to classes, configs from a table, and adapters in a model without a wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit.config import LoraConfig, PeftConfig, PeftType
from lorakit.errors import ConfigError
from lorakit.peft.lora_model import LoraModel
from lorakit.peft.mapping_func import get_peft_model
from lorakit.peft.placeholders import METHODS, PROMPT_METHODS, placeholder
from lorakit.peft.tuner import BaseTuner

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {
    PeftType.LORA: LoraConfig,
    **{method: placeholder(f"{stem}Config") for method, stem in METHODS.items()},
    **{method: placeholder(name) for method, name in PROMPT_METHODS.items()},
}
"""Method -> class of its config."""

PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = {PeftType.LORA: LoraModel}
"""Method -> class of its tuner; methods that are not here cannot be used."""

PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type[BaseTuner]] = {PeftType.LORA: LoraModel}
"""Method -> class of its tuner in a `PeftMixedModel`."""

PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.LORA: LoraModel.prefix}
"""Method -> how the names of its parameters begin."""


def get_peft_config(config_dict: Mapping[str, Any]) -> Any:
    """A config from a table that says its method.

    Args:
        config_dict: Field name -> value, `peft_type` among them.

    Raises:
        ConfigError: There is no method, it is not LORA, or a value is not allowed.
    """
    if "peft_type" not in config_dict:
        raise ConfigError("The config has no peft_type, so its method is not known; give 'LORA'.")
    return PeftConfig.from_peft_type(**config_dict)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on a model without a wrapper; the model itself comes back.

    Args:
        peft_config: How the adapter looks; it is only read.
        model: The base, changed in place.
        adapter_name: Its name.
        low_cpu_mem_usage: Leave the factors without memory until `set_peft_model_state_dict` fills them.
        state_dict: Names of tensors (…) that say where the adapter sits, instead of the config; only names are read.

    Raises:
        ConfigError: The config is not a LoraConfig, or does not fit.
        TargetError: Nothing matches.
        AdapterError: The name is taken or cannot be used.
        NotYetSupported: The config asks for what is not built yet.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ConfigError(
            f"`inject_adapter_in_model` does not support {getattr(peft_config, 'peft_type', None)} yet; this library "
            "is LoRA."
        )
    tuner = LoraModel(model)
    tuner.inject(adapter_name, peft_config, on_meta=low_cpu_mem_usage, state_dict=state_dict)
    return model
