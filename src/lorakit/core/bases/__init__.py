"""The table BASES: how a base weight is read and written, whatever way it is stored."""

from __future__ import annotations

from torch import nn

from lorakit.core.bases.dense import DENSE, TRANSPOSED
from lorakit.core.bases.storage import Base, at_least_fp32

__all__ = ["BASES", "Base", "at_least_fp32", "base_of"]

BASES: tuple[Base, ...] = (TRANSPOSED, DENSE)


def base_of(module: nn.Module, parameter: str = "weight") -> Base:
    """How a parameter of a module is stored: the weight's type is asked first, then the module's.

    Args:
        module: A module of the base.
        parameter: Name of its weight.
    """
    for owner in (type(module._parameters.get(parameter)), type(module)):
        for ancestor in owner.__mro__:
            dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
            for base in BASES:
                if dotted in base.types:
                    return base
    return DENSE
