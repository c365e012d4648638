"""`get_peft_model`: adapt a model and wrap it as its task asks.

PEFT's tables from method to classes, configs from a table, and adapters in a model without a wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig, PeftConfig, PeftType
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.model.index import AdapterIndex
from lorakit.errors import ConfigError, warn_caller
from lorakit.peft import adapter_queries
from lorakit.peft.model import PeftModel
from lorakit.peft.model_classes import PeftMixedModel
from lorakit.peft.placeholders import METHODS, PROMPT_METHODS, placeholder
from lorakit.peft.tuner import BaseTuner, LoraModel
from lorakit.targets import resolve

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Adapt a model in place and wrap it as PEFT does.

    Args:
        model: The base; a model that is wrapped already gets a second adapter without a second wrapper.
        peft_config: How the adapter looks; it is only read.
        adapter_name: Its name.
        mixed: Wrap it as a `PeftMixedModel`, which holds several active adapters.
        autocast_adapter_dtype: False gives the factors the dtype of the weight they stand beside.
        revision: Revision of the base, noted in the adapter's config.
        low_cpu_mem_usage: Accepted; factors are made once, where their site is.

    Returns:
        The wrapper for the config's task.

    Raises:
        ConfigError: The config is not a LoraConfig, or does not fit.
        TargetError: Nothing matches.
        AdapterError: The name is taken or cannot be used.
        NotYetSupported: The config, or an option, asks for what is not built yet.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}; a lorakit LoraConfig is needed.")
    _say_of_the_base(model, peft_config, revision)
    if revision is not None:
        peft_config = peft_config.with_fields(revision=revision)
    _make_room(model, peft_config, adapter_name)
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        model.set_adapter(adapter_name)
        return model
    kind = PeftModel.for_task(peft_config.task_type)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _make_room(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """What is said where a model has adapters already; one of the same name gives way, as when a cell is run again."""
    user: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    there = adapter_queries.configs_of(user)
    if there:
        replaced = f" The adapter '{adapter_name}' that was there is replaced." if adapter_name in there else ""
        warn_caller(
            "You are trying to modify a model with PEFT for a second time. It gets another adapter here, without a "
            f"second wrapper; call `.unload()` before, if that is not meant.{replaced}"
        )
    if adapter_name in there:
        resolve(
            AdapterIndex.of(user).candidates, with_targets(config, user), allow_partial=True
        )  # refused before it leaves
        core.detach(user, adapter_name)


def _say_of_the_base(model: nn.Module, config: LoraConfig, revision: str | None) -> None:
    old, new = config.base_model_name_or_path, getattr(model, "name_or_path", None) or None
    if old is not None and old != new:
        warn_caller(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. Please ensure that the "
            "correct base model is loaded when loading this checkpoint."
        )
    if revision is not None and config.revision not in (None, revision):
        warn_caller(
            f"peft config has already set base model revision to {config.revision}, overwriting with revision "
            f"{revision}"
        )


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
