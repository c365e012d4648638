"""Classes that hold what an adapter trains beside its factors, under PEFT's names."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING

from lorakit.core.parts.extras import ModuleCopies as ModulesToSaveWrapper
from lorakit.core.parts.token_rows import TokenAdapter as TrainableTokensLayer
from lorakit.core.parts.token_rows import TokenRows as TrainableTokensWrapper

__all__ = ["AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensLayer", "TrainableTokensWrapper"]

if TYPE_CHECKING:
    from lorakit.core.routes.switching import Switched as AuxiliaryTrainingWrapper
else:

    class AuxiliaryTrainingWrapper(ABC):  # noqa: B024  # nothing is made of it
        """What copied modules and trained rows have in common in PEFT; for `isinstance` alone."""

    AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)
    AuxiliaryTrainingWrapper.register(TrainableTokensWrapper)
