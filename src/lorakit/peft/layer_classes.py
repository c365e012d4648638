"""Adapted layers under PEFT's names: one class per kind of base, and the names of kinds that are not built.

Classes that hold what an adapter trains beside its factors, under PEFT's names.
"""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any

from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.lora_layer import LoraLayer as BaseTunerLayer
from lorakit.core.layers.modules_to_save import ModulesToSave as ModulesToSaveWrapper
from lorakit.core.layers.named_layers import LAYERS
from lorakit.core.layers.trainable_tokens import TokenAdapter as TrainableTokensLayer
from lorakit.core.layers.trainable_tokens import TrainableTokens as TrainableTokensWrapper
from lorakit.peft.placeholders import placeholder

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
]


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


if TYPE_CHECKING:
    from lorakit.core.layers.adapter_component import AdapterModule as AuxiliaryTrainingWrapper
else:

    class AuxiliaryTrainingWrapper(ABC):  # noqa: B024  # nothing is made of it
        """What copied modules and trained rows have in common in PEFT; for `isinstance` alone."""

    AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)
    AuxiliaryTrainingWrapper.register(TrainableTokensWrapper)
