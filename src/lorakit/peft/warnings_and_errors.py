"""PEFT's names for errors and warnings; the errors are lorakit's own classes."""

from __future__ import annotations

from lorakit.errors import LorakitError as PeftError
from lorakit.errors import TargetError as NoMatchingPeftModuleError

__all__ = ["NoMatchingPeftModuleError", "PartialTargetsWarning", "PeftError", "PeftWarning"]


class PeftWarning(UserWarning):
    """What PEFT's own warnings are; a filter over it also finds those of this face."""


class PartialTargetsWarning(PeftWarning, RuntimeWarning):
    """An entry of a config matches nothing; of PEFT's warnings of this some are of the one class, some of the other."""
