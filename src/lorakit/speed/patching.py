"""Replace a module in a model with an instance of a subclass that is created at runtime and shares the module's state.

State dict names, hooks, `isinstance` and `repr` are unaffected, and neither the class nor any attribute of the original
module is modified. A replacement can be undone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from lorakit.core.clones import is_watched as is_watched  # re-exported, like Forwards, for other modules in `speed`
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.routing.recompute import Forwards as Forwards

FORWARDS = "_forward_history"
"""Attribute that contains the forward history of a replaced module. lorakit layers have a forward history too."""

RECOMPUTES = "_recomputes_matmuls"
"""Attribute of a replaced feed-forward block whose backward pass recomputes matmuls instead of using saved results."""

OWN = (FORWARDS, RECOMPUTES)
"""Attributes that a replacement adds to the shared state."""

MARK = "_replaced_class"
"""Class attribute that contains the class of the original module; only replacement classes have it."""

CONTRACT = "_contract"
"""Name of the `__slots__` entry in which a replacement stores its `Contract`, outside the shared state."""

Forward = Callable[..., Any]
"""Fused `forward` that a replacement tries first.

It takes a module and the arguments of a call, and returns the output, or None if the call is not supported.
"""


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return a module's children by name; a child with two names is returned under both.

    Args:
        module: Any module.
    """
    return {name: child for name, child in module._modules.items() if child is not None}


def modules_at(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the children of a module that have the given names. Names that match no child are skipped.

    Args:
        module: Any module.
        names: Names of children.
    """
    return [child for name in names if (child := module._modules.get(name)) is not None]


@dataclass(frozen=True)
class Swap:
    """A replaced module in a model.

    Attributes:
        original: The original module.
        replacement: The module that replaces it.
        holders: Every (parent, attribute) pair at which the model contained the original.
    """

    original: nn.Module
    replacement: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]

    def do(self) -> None:
        """Install the replacement everywhere that the model contained the original."""
        self._replace(self.original, self.replacement)

    def undo(self) -> None:
        """Restore the original everywhere that the model contains the replacement."""
        for name in OWN:
            self.original.__dict__.pop(name, None)
        self._replace(self.replacement, self.original)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        for parent, attribute in self.holders:
            if parent._modules.get(attribute) is old:
                parent._modules[attribute] = new
        if isinstance(old, AdapterModule) and isinstance(new, AdapterModule):  # `state` lists modules by weak reference
            old.state.leave(old)
            new.state.join(new)


def undo(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Restore all originals, even if adapter layers have wrapped their replacements in the meantime.

    Args:
        model: The model with the replacements.
        swaps: All swaps made by one acceleration.
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
    """Create a replacement that shares a module's state and tries a fused `forward` first.

    Args:
        module: The original; it and the replacement share one `__dict__`.
        fast: Fused `forward`, called with the module and the arguments of the call.
        classes: Cache for one model: a dict from (original class, `name`) to replacement class.
        name: Name of the fused `forward`; modules with the same class and name share a replacement class.
    """
    key = (type(module), name)
    if key not in classes:
        classes[key] = _subclass(type(module), fast)
    made = _blank(classes[key])
    made.__dict__ = module.__dict__
    return made


def may_run(module: nn.Module) -> bool:
    """Return whether a module is a replacement whose fused `forward` may run now.

    Args:
        module: Any module.
    """
    contract = getattr(module, CONTRACT, None)  # replicas that torch creates have no contract
    return contract is not None and contract.holds()


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module or, if the module is a replacement, the class of the original.

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
        if not torch.compiler.is_compiling() and may_run(self):  # a compiler fuses the plain `forward` itself
            made = fast(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs) if made is None else made

    def as_original(self: nn.Module, protocol: int) -> Reduced:  # a class created at runtime cannot be imported
        return _blank, (original,), {name: value for name, value in vars(self).items() if name not in OWN}

    members: dict[str, Any] = {"forward": forward, "__reduce_ex__": as_original, "__slots__": (CONTRACT,)}
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__, MARK: original}
    return type(original.__name__, (original,), members)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Create an instance that has no state, without calling `__init__`."""
    return object.__new__(kind)
