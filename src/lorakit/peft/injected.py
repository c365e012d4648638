"""Adapters in a model without a wrapper: which act, and taking one off; for libraries that have their own wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorakit.peft import standing
from lorakit.peft.tuner import CONFIGS, BaseTuner


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make adapters the active ones; they alone are trained.

    Args:
        model: A model with adapters in it.
        adapter_name: One name or several.
        inference_mode: Activate them frozen.
        layer_cls: PEFT's; adapted layers are of one class here.

    Raises:
        RouteError: There is no such adapter.
    """
    BaseTuner(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: Any = None
) -> list[str] | None:
    """Take an adapter off; with an active one gone, the first that is left becomes active.

    Args:
        model: A model with adapters in it.
        adapter_name: The adapter; one that is not there is no matter, as in PEFT.
        prefix: PEFT's; there is one method here.
        layer_cls: PEFT's; adapted layers are of one class here.

    Returns:
        The adapters that are active now, or None where there are none.

    Raises:
        AdapterError: It is merged.
    """
    tuner = BaseTuner(model)
    if adapter_name in standing.configs_of(model):
        tuner.delete_adapter(adapter_name)
        if not standing.configs_of(model):
            setattr(model, CONFIGS, {})  # empty, as PEFT leaves it: transformers looks into it and takes it off itself
    return tuner.active_adapters or None
