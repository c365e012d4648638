"""The WEIGHT_FORMATS registry, which defines how base weights are read and written in each storage format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakit.core.clones import PARAMETRISED, is_pruned
from lorakit.core.quantization.bitsandbytes import EIGHT_BIT, FOUR_BIT
from lorakit.core.quantization.fp8 import FP8, FP8_EXPERTS
from lorakit.core.quantization.hqq import HQQ
from lorakit.core.quantization.int8_linear import INT8
from lorakit.core.quantization.packed_layouts import AWQ, COMPRESSED, GPTQ
from lorakit.core.quantization.torchao import TORCHAO
from lorakit.core.quantization.weight_format import (
    COMPUTED,
    COMPUTED_TRANSPOSED,
    DENSE,
    NOT_WRITTEN,
    TRANSPOSED,
    Stored,
    WeightFormat,
    at_least_fp32,
)

__all__ = [
    "NOT_WRITTEN",
    "WEIGHT_FORMATS",
    "Stored",
    "WeightFormat",
    "allow_repacking",
    "at_least_fp32",
    "disable_repacking",
    "is_computed",
    "weight_format_of",
]

WEIGHT_FORMATS: tuple[WeightFormat[Any, Any], ...] = (
    FOUR_BIT,
    EIGHT_BIT,
    TORCHAO,
    HQQ,
    FP8,
    FP8_EXPERTS,
    GPTQ,
    AWQ,
    COMPRESSED,
    INT8,
    COMPUTED,
    COMPUTED_TRANSPOSED,
    TRANSPOSED,
    DENSE,
)


def weight_format_of(module: nn.Module, parameter: str = "weight", as_stored: bool = False) -> WeightFormat[Any, Any]:
    """Return the storage format of a module's parameter; the parameter's type takes precedence over the module's.

    `as_stored` uses the stored weight without transposing it, even if the module stores it as (in, out).
    """
    registered = _registered(module, parameter)
    registered = DENSE if as_stored and registered.transposed else registered
    if is_computed(module, parameter):
        return COMPUTED_TRANSPOSED if registered.transposed else COMPUTED
    return registered


def is_computed(module: nn.Module, parameter: str = "weight") -> bool:
    """Return whether a parameter is computed by a parametrization or by pruning (torch.nn.utils.parametrize, prune)."""
    if parameter in module._parameters:
        return False
    return PARAMETRISED in module._modules or is_pruned(module, parameter)


def _registered(module: nn.Module, parameter: str) -> WeightFormat[Any, Any]:
    for owner in (type(module._parameters.get(parameter)), type(module)):
        for ancestor in owner.__mro__:
            dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
            for entry in WEIGHT_FORMATS:
                if dotted in entry.types and (not entry.parameters or parameter in entry.parameters):
                    return entry
    return DENSE


def disable_repacking(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Keep modules from repacking their weights in a forward pass, and return those that would have done so."""
    formats: dict[type[nn.Module], WeightFormat[Any, Any]] = {}
    changed = []
    for module in modules:
        if type(module) not in formats:
            formats[type(module)] = weight_format_of(module)
        if formats[type(module)].disable_repacking(module):
            changed.append(module)
    return changed


def allow_repacking(modules: Iterable[nn.Module]) -> None:
    """Undo `disable_repacking` for the modules that it returned."""
    for module in modules:
        weight_format_of(module).allow_repacking(module)
