"""Contracts of fused `forward` methods, checked on every call: what they assume about the modules that they bypass.

These must be the modules that were probed, and nothing may have changed in their settings, in their `forward` methods,
or in the functions that these call. This module does not depend on any particular fused `forward`.

A peft layer is recognized by identity: its class must be the one that peft's own module defines under this name, its
`forward` and everything that this resolves must come from peft, and nothing of it may have changed since the class was
first seen. Subclasses, copies and classes with a replaced method or helper run themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from types import FunctionType

from torch import nn

from lorakit.choices import CONV1D
from lorakit.core import Int8Linear, LoraLayer
from lorakit.identity.contract import Contract, contract_of, facts_of
from lorakit.identity.identities import MISSING, Fact, Identities, Identity, Unknown, original_class
from lorakit.speed.patching import children_of


def contract_for(
    modules: nn.Module | Sequence[nn.Module], fused: Collection[int] | None, identities: Identities
) -> Contract:
    """Collect what the fused `forward` of one or several modules currently relies on, once all replacements are
    installed. `fused` has the `id`s of the fused modules, or is None if everything inside the modules is bypassed.
    """
    facts, functions = list[Fact](), list[FunctionType]()
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        facts += _of_module(module, identities)
        functions += _live(module, identities)
        for holder, name, child in bypassed_modules(module, fused):
            functions += _live(child, identities)
            if is_operand(child):
                facts += (fact for one in _layers(child) for fact in identities.of(one).facts)
            else:
                facts += [(holder._modules, name, child), *_of_module(child, identities)]
    return contract_of(facts, functions)


def _live(module: nn.Module, identities: Identities) -> Iterator[FunctionType]:
    """Yield the functions that a module runs or, for an adapter layer, those that its layers run."""
    return (function for one in _layers(module) for function in identities.of(one).live)


def contract_of_model(model: nn.Module, identities: Sequence[Identity], facts: Sequence[Fact]) -> Contract:
    """Collect what the loss without logits relies on: what is partly bypassed, and other dictionary entries."""
    whole = (*facts, *(fact for one in identities for fact in one.facts))
    override = (vars(model), "forward", vars(model).get("forward", MISSING))
    return contract_of((*whole, override), [function for one in identities for function in one.live])


def is_operand(module: nn.Module) -> bool:
    """Return whether a module is linear, with or without adapters; these are looked up on each call."""
    is_linear = isinstance(module, (nn.Linear, Int8Linear)) or type(module).__name__ == CONV1D
    return is_linear or is_adapted(module)


def bypassed_modules(module: nn.Module, fused: Collection[int] | None) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name, child) for each module that a fused `forward` bypasses; `fused` is as in `contract_for`."""
    if is_adapted(module):
        return
    for name, child in children_of(module).items():
        yield module, name, child
        if fused is None or id(child) in fused:
            yield from bypassed_modules(child, fused)


def _of_module(module: nn.Module, identities: Identities) -> Iterator[Fact]:
    if not is_adapted(module):
        yield from facts_of(module, identities)
        return
    for layer in (module, *_layers(module)):  # attaching or removing adapters changes the layer's settings
        yield from identities.of(layer).facts


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return a module or, for an adapter layer, its innermost base layer; before it, the layers around it from peft."""
    layers = []
    while is_adapted(module):
        layers += [module] if is_peft_linear(module) else []
        module = module.get_submodule("base_layer")
    return [*layers, module]


# ---- adapter layers from lorakit and from peft, which is not imported

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
    identity = Identities().of_class(kind)
    if not identity.digest:
        raise Unknown(identity.why)
    return contract_of(identity.facts, identity.live)


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is an adapter layer from lorakit or peft."""
    return isinstance(module, LoraLayer) or is_peft_linear(module)
