"""`get_peft_model`: adapt a model and wrap it as its task asks."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.peft.model import PeftModel


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Adapt a model in place and wrap it as PEFT does.

    Args:
        model: The base; a model that is wrapped already gets a second adapter without a second wrapper.
        peft_config: How the adapter looks; it is only read.
        adapter_name: Its name.
        kwargs: See `options.py`.

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
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, peft_config, **kwargs)
        model.set_adapter(adapter_name)
        return model
    return PeftModel.for_task(peft_config.task_type)(model, peft_config, adapter_name, **kwargs)
