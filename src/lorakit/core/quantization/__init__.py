"""The registry WEIGHT_FORMATS: how a base weight is read and written, whatever way it is stored."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorakit.core.clones import PARAMETRISED
from lorakit.core.quantization.bitsandbytes import EIGHT_BIT, FOUR_BIT
from lorakit.core.quantization.hqq import HQQ
from lorakit.core.quantization.torchao import TORCHAO
from lorakit.core.quantization.weight_format import (
    COMPUTED,
    COMPUTED_TRANSPOSED,
    DENSE,
    NOT_WRITTEN,
    TRANSPOSED,
    WeightFormat,
    at_least_fp32,
)

__all__ = [
    "NOT_WRITTEN",
    "WEIGHT_FORMATS",
    "WeightFormat",
    "at_least_fp32",
    "disable_repacking",
    "is_computed",
    "let_go",
    "weight_format_of",
]

WEIGHT_FORMATS: tuple[WeightFormat, ...] = (
    FOUR_BIT,
    EIGHT_BIT,
    TORCHAO,
    HQQ,
    COMPUTED,
    COMPUTED_TRANSPOSED,
    TRANSPOSED,
    DENSE,
)


def weight_format_of(module: nn.Module, parameter: str = "weight", as_stored: bool = False) -> WeightFormat:
    """How a parameter of a module is stored: the weight's type is asked first, then the module's.

    Args:
        module: A module of the base.
        parameter: Name of its weight.
        as_stored: Read it as it lies, also where the module holds it transposed.
    """
    row = _row_of(module, parameter)
    row = DENSE if as_stored and row.transposed else row
    if is_computed(module, parameter):
        return COMPUTED_TRANSPOSED if row.transposed else COMPUTED
    return row


def is_computed(module: nn.Module, parameter: str = "weight") -> bool:
    """Whether torch.nn.utils.parametrize computes a parameter.

    Args:
        module: A module of the base.
        parameter: Name of its weight.
    """
    return PARAMETRISED in module._modules and parameter not in module._parameters


def _row_of(module: nn.Module, parameter: str) -> WeightFormat:
    for owner in (type(module._parameters.get(parameter)), type(module)):
        for ancestor in owner.__mro__:
            dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
            for base in WEIGHT_FORMATS:
                if dotted in base.types:
                    return base
    return DENSE


def disable_repacking(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Keep modules from rewriting their own weight in a forward, as those of some quantizers do in eval mode.

    Args:
        modules: All modules of a model; values stay as they are.

    Returns:
        The modules that had to be held; `let_go` ends it.
    """
    rows: dict[type[nn.Module], WeightFormat] = {}
    held = []
    for module in modules:
        if type(module) not in rows:
            rows[type(module)] = weight_format_of(module)
        if rows[type(module)].hold(module):
            held.append(module)
    return held


def let_go(modules: Iterable[nn.Module]) -> None:
    """End what `disable_repacking` did.

    Args:
        modules: What it returned.
    """
    for module in modules:
        weight_format_of(module).let_go(module)
