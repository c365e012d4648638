"""`get_peft_model`: adapt a model and wrap it as its task asks."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.layering.sitemap import survey
from lorakit.core.making.attaching import with_targets
from lorakit.errors import ConfigError, warn_caller
from lorakit.peft import standing
from lorakit.peft.mixed_model import PeftMixedModel
from lorakit.peft.model import PeftModel
from lorakit.targets import resolve


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
    there = standing.configs_of(user)
    if there:
        replaced = f" The adapter '{adapter_name}' that was there is replaced." if adapter_name in there else ""
        warn_caller(
            "You are trying to modify a model with PEFT for a second time. It gets another adapter here, without a "
            f"second wrapper; call `.unload()` before, if that is not meant.{replaced}"
        )
    if adapter_name in there:
        resolve(survey(user).candidates, with_targets(config, user), allow_partial=True)  # refused before it leaves
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
