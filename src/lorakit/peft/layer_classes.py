"""Adapted layers under PEFT's names: one class per kind of base, and the names of kinds that are not built."""

from __future__ import annotations

from typing import Any

from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.layer import LoraLayer as BaseTunerLayer
from lorakit.core.layering.layer_names import LAYERS
from lorakit.peft.placeholders import placeholder

__all__ = ["BaseTunerLayer", "LoraLayer"]

NAMES = {
    "Linear": "Linear",
    "Embedding": "Embedding",
    "Conv1d": "Conv1d",
    "Conv2d": "Conv2d",
    "Conv3d": "Conv3d",
    "MultiheadAttention": "MultiheadAttention",
    "ParamWrapper": "ParamWrapper",
    "Linear4bit": "Linear4bit",
    "Linear8bitLt": "Linear8bitLt",
}
"""PEFT's name -> name of the class in the core, where it has one."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    wanted = NAMES.get(name)
    found = next((kind for kind in LAYERS.values() if kind.__name__ == wanted), None)
    return found or placeholder(name)
