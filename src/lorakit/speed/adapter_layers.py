"""Recognize adapter layers from lorakit and from peft.

A peft layer is recognized by identity, not by name: its class must be the class that peft's own module defines under
this name, and the class's `forward` must have the source in that module. A subclass, a class with the same name, and a
class whose `forward` was replaced are not recognized, so they run themselves. peft is not imported.
"""

from __future__ import annotations

import functools
from types import FunctionType

from torch import nn

from lorakit.core import LoraLayer
from lorakit.identity.identities import original_class
from lorakit.identity.source import source_of

HOME = "peft.tuners.lora.layer"
"""The module that defines peft's LoRA layers."""

LINEAR = "Linear"
"""Name of the class in `HOME` whose `forward` is fused."""


def is_peft_linear(module: nn.Module) -> bool:
    """Return whether a module is peft's LoRA layer around a linear module, with peft's own `forward`.

    Args:
        module: Any module; for a replacement, the result is that of the original.
    """
    kind = original_class(module)
    forward = kind.forward
    # a subclass or a copy of the class is not the class that the module defines
    return (
        isinstance(forward, FunctionType) and forward.__globals__.get(LINEAR) is kind and _is_forward_of_peft(forward)
    )


@functools.lru_cache(maxsize=64)
def _is_forward_of_peft(function: FunctionType) -> bool:
    """Return whether a function is the `forward` in the source of peft's layer."""
    is_there = function.__globals__.get("__name__") == HOME and function.__qualname__ == f"{LINEAR}.forward"
    return is_there and source_of(function) is not None


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is an adapter layer from lorakit or peft.

    Args:
        module: Any module.
    """
    return isinstance(module, LoraLayer) or is_peft_linear(module)
