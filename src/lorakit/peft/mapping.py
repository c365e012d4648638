"""`get_peft_model`, PEFT's tables that map methods to classes, and functions for models without a wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig, PeftConfig, PeftConfigMixin, PeftType
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import matched
from lorakit.errors import ConfigError, warn_caller
from lorakit.peft import matching, model_adapters
from lorakit.peft.model import PeftModel
from lorakit.peft.model_classes import PeftMixedModel
from lorakit.peft.placeholders import CONFIGS, placeholder
from lorakit.peft.tuner import BaseTuner, LoraModel


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Add a LoRA adapter to a model in place, and return a `PeftModel` that wraps the model.

    Args:
        model: The base model; a model that is already wrapped gets another adapter but no second wrapper.
        peft_config: The adapter's config; it is not modified.
        adapter_name: Name of the new adapter.
        mixed: Whether to wrap the model in a `PeftMixedModel`, which can have several active adapters.
        autocast_adapter_dtype: If false, the factors are cast to the dtype of their base weight.
        revision: Revision of the base model to record in the adapter's config.
        low_cpu_mem_usage: Ignored; factors are created on their site's device.

    Raises:
        ConfigError: `peft_config` is not a LoraConfig or is not valid for the model.
        TargetError: Nothing in the model matches the targets.
        AdapterError: `adapter_name` is invalid.
    """
    model_adapters.check_is_lora(peft_config, "peft_config is a {kind}; it must be a lorakit LoraConfig.")
    if isinstance(model, PeftModel):
        peft_config = matching.with_paths_inside(peft_config)
    _warn_of_the_base(model, peft_config, revision)
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
    """Warn if the model already has adapters, and remove an existing adapter of the same name."""
    user = model_adapters.user_model(model)
    there = model_adapters.configs_of(user)
    if there:
        replaced = f" The existing adapter '{adapter_name}' is replaced." if adapter_name in there else ""
        warn_caller(
            "You are trying to modify a model with PEFT for a second time. The model gets another adapter, but no "
            f"second wrapper; to remove the existing adapters, call `.unload()` first.{replaced}"
        )
    if adapter_name in there:
        index = AdapterIndex.of(user)
        matched(index, with_targets(config, index), allow_partial=True)  # may raise, so check before removing
        core.detach(user, adapter_name)


def _warn_of_the_base(model: nn.Module, config: LoraConfig, revision: str | None) -> None:
    old, new = config.base_model_name_or_path, getattr(model, "name_or_path", None) or None
    if old is not None and old != new:
        warn_caller(f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'.")
    if revision is not None and config.revision not in (None, revision):
        text = f"peft config has already set base model revision to {config.revision}"
        warn_caller(f"{text}, overwriting with revision {revision}")


PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {
    PeftType.LORA: LoraConfig,
    **{method: placeholder(name) for method, name in CONFIGS.items()},
}
"""Config class of each method."""

PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = {PeftType.LORA: LoraModel}
"""Tuner class of each supported method."""

PEFT_TYPE_TO_MIXED_MODEL_MAPPING = dict(PEFT_TYPE_TO_TUNER_MAPPING)
"""Tuner class of each method that a `PeftMixedModel` supports."""

PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.LORA: LoraModel.prefix}
"""Parameter-name prefix of each supported method."""


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfigMixin:
    """Create a config from a dictionary whose `peft_type` specifies the method.

    Raises:
        ConfigError: `peft_type` is missing or not LORA, or a value is invalid.
    """
    if "peft_type" not in config_dict:
        text = "The config has no peft_type, so its method is unknown; set peft_type to 'LORA'."
        raise ConfigError(text, field="peft_type")
    return PeftConfig.from_peft_type(**config_dict)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Add an adapter to a model, and return the model without wrapping it.

    With `low_cpu_mem_usage`, the factors stay on the meta device until `set_peft_model_state_dict` fills them. The
    names of the tensors (any shape) in `state_dict`, not the config, determine the targets; the values are not read.

    Raises:
        ConfigError: `peft_config` is not a LoraConfig or is not valid for the model.
    """
    text = "`inject_adapter_in_model` does not support {method} yet; use LoraConfig."
    model_adapters.check_is_lora(peft_config, text)
    tuner = LoraModel(model)
    tuner.inject(adapter_name, peft_config, on_meta=low_cpu_mem_usage, state_dict=state_dict)
    return model
