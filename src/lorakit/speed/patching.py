"""Replace one module of one model by an instance of a runtime subclass that shares its state.

State dict names, hooks, `isinstance` and `repr` are unchanged; no class and no attribute of the original module is
modified. Undoing puts the original back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.core.layers.adapter_component import AdapterModule

FORWARDS = "_forward_history"
"""Attribute of a replaced module with its forward history, as on lorakit layers."""

RECOMPUTES = "_recomputes_matmuls"
"""Attribute of a replaced feed-forward: it recomputes its matmuls in the backward instead of saving the results."""

OWN = (FORWARDS, RECOMPUTES)
"""Attributes that a replacement adds to the shared state."""

MARK = "_replaced_class"
"""Class attribute that only replacement classes have: the original's class."""

CONTRACT = "_contract"
"""`__slots__` entry of a replacement, not part of the shared state: what its fused forward relies on."""

Forward = Callable[..., Any]
"""The forward that a replacement tries first: module, arguments -> output, or None if it does not support the call."""


@dataclass(frozen=True)
class Swap:
    """A replaced module of a model.

    Attributes:
        path: Path in the model.
        original: The original module.
        replacement: The module that replaces it.
        holders: Every (parent, attribute) that held it.
    """

    path: str
    original: nn.Module
    replacement: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]

    def do(self) -> None:
        """Put the replacement wherever the original is."""
        self._replace(self.original, self.replacement)

    def undo(self) -> None:
        """Put the original back wherever the replacement is."""
        for name in OWN:
            self.original.__dict__.pop(name, None)
        self._replace(self.replacement, self.original)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        for parent, attribute in self.holders:
            if parent._modules.get(attribute) is old:
                parent._modules[attribute] = new
        if isinstance(old, AdapterModule) and isinstance(new, AdapterModule):  # weak references: one may be gone
            old.state.leave(old)
            new.state.join(new)


def undo(model: nn.Module, swaps: Iterable[Swap]) -> None:
    """Put all originals back, including inside adapter layers that hold a replacement by now.

    Args:
        model: The model with the replacements.
        swaps: All swaps of one acceleration.
    """
    originals: dict[int, nn.Module] = {}
    for swap in swaps:
        swap.undo()
        originals[id(swap.replacement)] = swap.original
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in originals:
                parent._modules[name] = originals[id(child)]


def make_replacement(module: nn.Module, fast: Forward, classes: dict[tuple[type, str], type], name: str) -> nn.Module:
    """Create a module with the state of another and a fused forward.

    Args:
        module: The original; both share one `__dict__`.
        fast: Tried first, with the module before the call's own arguments.
        classes: Cache for one model, (original class, `name`) -> class.
        name: Name of the fused forward: modules of one class and name share a class.
    """
    key = (type(module), name)
    if key not in classes:
        classes[key] = _subclass(type(module), fast)
    made = _blank(classes[key])
    made.__dict__ = module.__dict__
    return made


def rely(made: nn.Module, contract: Any) -> None:
    """Set when a replacement's fused forward may run; without a contract it never does.

    Args:
        made: The replacement.
        contract: Checked at each call.
    """
    setattr(made, CONTRACT, contract)


def may_run(module: nn.Module) -> bool:
    """Return whether a module is a replacement whose fused forward may run now.

    Args:
        module: Any module.
    """
    contract = getattr(module, CONTRACT, None)  # a replica of a replacement made by torch has none
    return contract is not None and contract.holds()


def original_class(module: nn.Module) -> type:
    """Return the class of a module, or of the original if it is a replacement.

    Args:
        module: Any module.
    """
    kind: type = getattr(type(module), MARK, type(module))
    return kind


def is_replacement(module: nn.Module) -> bool:
    """Return whether a module is a replacement.

    Args:
        module: Any module.
    """
    return MARK in vars(type(module))


def _subclass(original: type[nn.Module], fast: Forward) -> type:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler fuses on its own, and gets the plain forward
            return original.forward(self, *args, **kwargs)
        if not may_run(self):
            return original.forward(self, *args, **kwargs)
        made = fast(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs) if made is None else made

    def as_original(self: nn.Module, protocol: int) -> Any:  # a runtime class cannot be imported
        return _blank, (original,), {name: value for name, value in vars(self).items() if name not in OWN}

    members = {"forward": forward, "__reduce_ex__": as_original, "__module__": original.__module__, MARK: original}
    return type(
        original.__name__, (original,), {**members, "__slots__": (CONTRACT,), "__qualname__": original.__qualname__}
    )


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return an instance without any state and without calling the class."""
    return object.__new__(kind)
