"""Classes that hold what an adapter trains beside its factors, under PEFT's names."""

from __future__ import annotations

from lorakit.core.extras import ModuleCopies
from lorakit.core.extras import ModuleCopies as AuxiliaryTrainingWrapper
from lorakit.core.extras import ModuleCopies as ModulesToSaveWrapper
from lorakit.peft.elsewhere import placeholder

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModuleCopies",
    "ModulesToSaveWrapper",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
]

TrainableTokensWrapper = placeholder("TrainableTokensWrapper")
TrainableTokensLayer = placeholder("TrainableTokensLayer")
