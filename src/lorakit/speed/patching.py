"""Replace one module of one model by an instance of a runtime subclass that shares its state.

State dict names, hooks, `isinstance` and `repr` are unchanged; no class and no attribute of the original module is
modified. Undoing puts the original back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from lorakit.core.clones import is_watched as is_watched  # re-exported, like Forwards, for the rest of speed
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.routing.recompute import Forwards as Forwards

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


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a module by name; one that has two names is returned under both.

    Args:
        module: Any module.
    """
    return {name: child for name, child in module._modules.items() if child is not None}


def modules_at(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the children of a module with these names, without those that are missing.

    Args:
        module: Any module.
        names: Names of children.
    """
    return [child for name in names if (child := module._modules.get(name)) is not None]


@dataclass(frozen=True)
class Swap:
    """A replaced module of a model.

    Attributes:
        original: The original module.
        replacement: The module that replaces it.
        holders: Every (parent, attribute) that held it.
    """

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


def undo(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put all originals back, including inside adapter layers that hold a replacement by now.

    Args:
        model: The model with the replacements.
        swaps: All swaps of one acceleration.
    """
    originals = {id(swap.replacement): swap.original for swap in swaps}
    for swap in swaps:
        swap.undo()
    for parent in list(model.modules()):
        for name, child in children_of(parent).items():
            if id(child) in originals:
                parent._modules[name] = originals[id(child)]


def make_replacement(
    module: nn.Module, fast: Forward, classes: dict[tuple[type, str], type[nn.Module]], name: str
) -> nn.Module:
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


def may_run(module: nn.Module) -> bool:
    """Return whether a module is a replacement whose fused forward may run now.

    Args:
        module: Any module.
    """
    contract = getattr(module, CONTRACT, None)  # a replica of a replacement made by torch has none
    return contract is not None and contract.holds()


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or of the original if it is a replacement.

    Args:
        module: Any module.
    """
    return getattr(type(module), MARK, type(module))


def is_replacement(module: nn.Module) -> bool:
    """Return whether a module is a replacement.

    Args:
        module: Any module.
    """
    return MARK in vars(type(module))


Arguments = ParamSpec("Arguments")
Output = TypeVar("Output")
Reduced = tuple[Callable[[type[nn.Module]], nn.Module], tuple[type[nn.Module]], dict[str, Any]]


def _subclass(
    original: type[nn.Module], fast: Callable[Concatenate[nn.Module, Arguments], Output | None]
) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Output:
        made = None
        if not torch.compiler.is_compiling() and may_run(self):  # a compiler fuses on its own, over the plain forward
            made = fast(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs) if made is None else made

    def as_original(self: nn.Module, protocol: int) -> Reduced:  # a runtime class cannot be imported
        return _blank, (original,), {name: value for name, value in vars(self).items() if name not in OWN}

    members: dict[str, Any] = {"forward": forward, "__reduce_ex__": as_original, "__slots__": (CONTRACT,)}
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__, MARK: original}
    return type(original.__name__, (original,), members)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return an instance without any state and without calling the class."""
    return object.__new__(kind)
