"""Freeze a base while it has adapters, and restore its `requires_grad` flags and its repacking afterwards.

What is needed to restore a module is stored in that module. A copy or pickle of one adapted layer therefore contains
the parameters of that layer, and not those of the whole base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from lorakit.core.model.index import AdapterIndex
from lorakit.core.quantization import allow_repacking, disable_repacking

RECORD = "_lorakit_frozen"
"""Name of the attribute in which a base module stores its `FrozenModule`."""


@dataclass
class FrozenModule:
    """Changes that freezing made to a module: its own parameters with their flags, and whether it repacked."""

    trained: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    repacks: bool = False


def freeze(index: AdapterIndex) -> None:
    """Freeze the parameters of a base without adapters, and keep its modules from repacking their weights."""
    repacking = {id(module) for module in disable_repacking(index.everything.values())}
    seen: set[int] = set()
    for module in index.everything.values():
        held = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        if held or id(module) in repacking:
            trained = [(parameter, parameter.requires_grad) for parameter in held]
            module.__dict__[RECORD] = FrozenModule(trained, id(module) in repacking)
        for parameter in held:
            seen.add(id(parameter))
            parameter.requires_grad_(False)


def flags(index: AdapterIndex) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield the base's parameters, each with its `requires_grad` flag before the base was frozen."""
    for module in _base_modules(index):
        record: FrozenModule = module.__dict__.get(RECORD, FrozenModule())
        yield from record.trained


@contextmanager
def replacing(index: AdapterIndex) -> Iterator[None]:
    """Let other parameters, such as shards, replace those of a frozen base in a block; `restore` then changes them.

    No parameter of the base is referred to within the block, so that each one is freed when it is replaced.
    """
    held = list[tuple[FrozenModule, nn.Module, list[tuple[str, bool]]]]()
    for module in _base_modules(index):
        record: FrozenModule | None = module.__dict__.get(RECORD)
        if record is not None:
            names = {id(parameter): name for name, parameter in module._parameters.items()}
            flags = [(names[id(parameter)], flag) for parameter, flag in record.trained if id(parameter) in names]
            held.append((record, module, flags))
            record.trained = []
    try:
        yield
    finally:
        for record, module, flags in held:
            record.trained = [(p, flag) for name, flag in flags if (p := module._parameters[name]) is not None]


def restore(index: AdapterIndex) -> None:
    """Undo `freeze` after the last adapter was removed."""
    for module in _base_modules(index):
        record: FrozenModule = module.__dict__.pop(RECORD, FrozenModule())
        for parameter, trained in record.trained:
            parameter.requires_grad_(trained)
        if record.repacks:
            allow_repacking([module])


def _base_modules(index: AdapterIndex) -> Iterator[nn.Module]:
    """Yield all modules of a model, and those that a merge replaced with plain ones."""
    yield from index.everything.values()
    for _, layer in index.layers():
        yield from layer.replaced
