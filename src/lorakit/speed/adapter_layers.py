"""Recognize adapter layers from lorakit and from peft, which is not imported.

A peft layer is recognized by identity: its class must be the one that peft's own module defines under this name, its
`forward` and everything that this resolves must come from peft, and nothing of it may have changed since the class was
first seen. Subclasses, copies and classes with a replaced method or helper run themselves.
"""

from __future__ import annotations

import functools
from types import FunctionType

from torch import nn

from lorakit.core import LoraLayer
from lorakit.identity.contract import Contract, contract_of
from lorakit.identity.identities import Identities, Unknown, original_class

HOME = "peft.tuners.lora.layer"
"""The module that defines peft's LoRA layers."""

LINEAR = "Linear"
"""Name of the class in `HOME` whose `forward` is fused."""


def is_peft_linear(module: nn.Module) -> bool:
    """Return whether a module, or its original, is peft's LoRA layer around a linear module, with its own `forward`."""
    kind = original_class(module)
    forward = kind.forward
    # a subclass or a copy of the class is not the class that the module defines
    if not isinstance(forward, FunctionType) or forward.__globals__.get(LINEAR) is not kind:
        return False
    try:
        return forward.__globals__.get("__name__") == HOME and _contract_of_class(kind).is_unchanged()
    except Unknown:
        return False


@functools.lru_cache(maxsize=16)  # exceptions are not stored
def _contract_of_class(kind: type[nn.Module]) -> Contract:
    """Collect what a layer of peft runs; raise Unknown if any source is not available or not that of peft."""
    found = Identities().of_class(kind)
    if not found.digest:
        raise Unknown(found.why)
    return contract_of(found.facts, found.live)


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is an adapter layer from lorakit or peft."""
    return isinstance(module, LoraLayer) or is_peft_linear(module)
