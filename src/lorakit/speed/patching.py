"""A stand-in for one module of one model: an instance of a subclass made at run time that shares its state.

Names in the state dict, hooks, `isinstance` and `repr` stay as they were; no class and no attribute of anybody's
module is changed. Undoing puts the original back in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.core.layers.adapter_component import AdapterModule

FORWARDS = "_fast_forwards"
"""Where a module with a stand-in keeps its forwards, as each layer of ours does."""

AGAIN = "_multiplies_again"
"""Where a feed-forward with a stand-in keeps that it multiplies again in the backward instead of keeping the result."""

OWN = (FORWARDS, AGAIN)
"""What a stand-in adds to the state that it shares."""

MARK = "_stands_in"
"""Attribute of the classes of stand-ins alone: the original's class."""

CONTRACT = "_contract"
"""Slot of a stand-in, not of the state that it shares: what its fast forward relies on."""

Forward = Callable[..., Any]
"""What a stand-in tries first: module, arguments -> output, or None where it does not apply to this call."""


@dataclass(frozen=True)
class Swap:
    """One module of a model with a stand-in in its place.

    Attributes:
        path: Path in the model.
        original: The module that stood there.
        stand_in: What stands there now.
        holders: Every (parent, attribute) that held it.
    """

    path: str
    original: nn.Module
    stand_in: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]

    def do(self) -> None:
        """Put the stand-in wherever the original stands."""
        self._replace(self.original, self.stand_in)

    def undo(self) -> None:
        """Put the original back, wherever the stand-in still stands."""
        for name in OWN:
            self.original.__dict__.pop(name, None)
        self._replace(self.stand_in, self.original)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        for parent, attribute in self.holders:
            if parent._modules.get(attribute) is old:
                parent._modules[attribute] = new
        if isinstance(old, AdapterModule) and isinstance(
            new, AdapterModule
        ):  # the state knows its layers weakly, and one may go
            old.state.leave(old)
            new.state.join(new)


def undo(model: nn.Module, swaps: Iterable[Swap]) -> None:
    """Put all originals back, also where an adapter's layer holds a stand-in by now.

    Args:
        model: What the swaps were made in.
        swaps: All swaps of one acceleration.
    """
    originals: dict[int, nn.Module] = {}
    for swap in swaps:
        swap.undo()
        originals[id(swap.stand_in)] = swap.original
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in originals:
                parent._modules[name] = originals[id(child)]


def stand_in(module: nn.Module, fast: Forward, classes: dict[tuple[type, str], type], name: str) -> nn.Module:
    """A module with the state of another and a faster forward.

    Args:
        module: The original; the two share one `__dict__`.
        fast: Tried first, with the module in front of the call's own arguments.
        classes: Classes made so far for one model, by original class and `name`; added to.
        name: Name of the recipe: modules of one class and recipe get one class.
    """
    key = (type(module), name)
    if key not in classes:
        classes[key] = _subclass(type(module), fast)
    made = _blank(classes[key])
    made.__dict__ = module.__dict__
    return made


def rely(made: nn.Module, contract: Any) -> None:
    """Tell a stand-in when its fast forward may run; without a contract it never does.

    Args:
        made: The stand-in.
        contract: Asked at each call whether it holds.
    """
    setattr(made, CONTRACT, contract)


def may_run(module: nn.Module) -> bool:
    """Return whether a module is a stand-in whose fast forward may run now.

    Args:
        module: Any module.
    """
    contract = getattr(module, CONTRACT, None)  # a replica that torch made of a stand-in has none
    return contract is not None and contract.holds()


def plain_class(module: nn.Module) -> type:
    """Return the class of a module, or of the original if it is a stand-in.

    Args:
        module: Any module.
    """
    kind: type = getattr(type(module), MARK, type(module))
    return kind


def is_stand_in(module: nn.Module) -> bool:
    """Whether a module is a stand-in.

    Args:
        module: Any module.
    """
    return MARK in vars(type(module))


def _subclass(original: Any, fast: Forward) -> type:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler fuses by itself, and gets what it would get without us
            return original.forward(self, *args, **kwargs)
        if not may_run(self):
            return original.forward(self, *args, **kwargs)
        made = fast(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs) if made is None else made

    def as_original(self: nn.Module, protocol: Any) -> Any:  # copies and pickles are plain: a made class has no address
        return _blank, (original,), {name: value for name, value in vars(self).items() if name not in OWN}

    members = {"forward": forward, "__reduce_ex__": as_original, "__module__": original.__module__, MARK: original}
    return type(
        original.__name__, (original,), {**members, "__slots__": (CONTRACT,), "__qualname__": original.__qualname__}
    )


def _blank(kind: Any) -> nn.Module:
    """An instance without any state; what a class does when it is called is not asked for."""
    made: nn.Module = object.__new__(kind)
    return made
