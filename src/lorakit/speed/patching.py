"""Replace a module in a model with an instance of a subclass, created at runtime, that shares the module's state.

State dict names, hooks, `isinstance` and `repr` are unaffected; neither the class nor any attribute of the original is
modified, and the replacement can be undone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.clones import has_observers as has_observers
from lorakit.core.clones import is_watched as is_watched  # re-exported, like Forwards, for other modules in `speed`
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.model.index import walk as walk
from lorakit.core.routing.recompute import Forwards as Forwards
from lorakit.identity.identities import MARK
from lorakit.ops.autograd import is_traced

RECOMPUTES = "_recomputes_matmuls"
"""Attribute of a replaced feed-forward block whose backward pass recomputes matmuls."""

DECODES = "_decodes"
"""Attribute of a decoder layer with the `Fused` of calls with a cache; see `lorakit.speed.decoding`."""

BOUND = "_bound"
"""The `__slots__` entry in which a replacement stores its `Fused`, outside the shared state."""

Options = dict[str, Any]
"""The arguments of a call other than the hidden states, by name."""


class Fused(NamedTuple):
    """The fused `forward` of one replacement: `run` returns None if the module's own `forward` must run. `accepts` says
    whether the other arguments of a call are supported, `holds` whether all that `run` relies on is unchanged.
    """

    accepts: Callable[[Options], bool]
    holds: Callable[[], bool]
    run: Callable[[Tensor, Options], Any]


def parameters_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the parameters of a class's `forward`, without `self`."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def split_call(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Options]:
    """Split the arguments of a call into the hidden states and the others, by the names of `forward`'s parameters. The
    hidden states are None if the call has none, or has more positional arguments than `forward` has parameters.
    """
    options = dict(kwargs)
    if not args:
        return options.pop("hidden_states", None), options
    if len(args) > 1:
        if len(args) > len(names):
            return None, options
        options.update(zip(names[1:], args[1:], strict=False))
    return args[0], options


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return a module's children by name; a child with two names is returned under both."""
    return {name: child for name, child in module._modules.items() if child is not None}


def attribute_at(module: nn.Module, path: str) -> Any:
    """Return the module or function at a path relative to a module, or None; the path "" is the module itself."""
    inside: Any = module
    for name in path.split(".") if path else ():
        inside = getattr(inside, name, None)
    return inside


def module_at(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path relative to a module, or None; there is none at the path ""."""
    if "." not in path:
        return module._modules.get(path)
    inside: nn.Module | None = module
    for name in path.split("."):
        inside = None if inside is None else inside._modules.get(name)
    return inside


def modules_at(module: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """Return the modules at paths relative to a module; paths that match no module are skipped."""
    return [inside for path in paths if (inside := module_at(module, path)) is not None]


@dataclass(frozen=True)
class Swap:
    """A replaced module, and every (parent, attribute) pair at which the model contained the original."""

    original: nn.Module
    replacement: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]

    def do(self) -> None:
        """Install the replacement everywhere that the model contained the original."""
        self._replace(self.original, self.replacement)

    def undo(self) -> None:
        """Restore the original everywhere that the model contains the replacement."""
        self.original.__dict__.pop(RECOMPUTES, None)
        self._replace(self.replacement, self.original)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        for parent, attribute in self.holders:
            if parent._modules.get(attribute) is old:
                parent._modules[attribute] = new
        if isinstance(old, AdapterModule) and isinstance(new, AdapterModule):  # `state` lists modules by weak reference
            new.state.substitute(old, new)


def undo(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Restore the originals of all swaps, even if adapter layers have wrapped their replacements in the meantime."""
    originals = {id(swap.replacement): swap.original for swap in swaps}
    for swap in swaps:
        swap.undo()
    for parent in list(model.modules()):
        for name, child in children_of(parent).items():
            if id(child) in originals:
                parent._modules[name] = originals[id(child)]


def make_replacement(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """Create a replacement that shares a module's `__dict__` and tries the fused `forward` stored as BOUND. `classes`
    maps original to replacement classes, for one model.
    """
    if type(module) not in classes:
        classes[type(module)] = subclass(type(module), BOUND, __slots__=(BOUND,))
    replacement = _blank(classes[type(module)])
    replacement.__dict__ = module.__dict__
    return replacement


def may_run(module: nn.Module) -> bool:
    """Return whether a module is a replacement whose fused `forward` may run now."""
    fused: Fused | None = getattr(module, BOUND, None)  # replicas that torch creates have none
    return fused is not None and not is_traced() and fused.holds()


def is_replacement(module: nn.Module) -> bool:
    """Return whether a module is a replacement."""
    return BOUND in vars(type(module))


Reduced = tuple[Callable[[type[nn.Module]], nn.Module], tuple[type[nn.Module]], dict[str, Any]]


def subclass(original: type[nn.Module], attribute: str, **more: Any) -> type[nn.Module]:
    """Return a subclass whose instances try the `Fused` in this attribute; it has the members in `more`, too."""
    names = parameters_of(original)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = None
        fused: Fused | None = getattr(self, attribute, None)  # replicas that torch creates have none
        # a compiler fuses the plain `forward` itself, and `torch.func` transforms cannot enter a fused one
        if fused is not None and not (torch.compiler.is_compiling() or is_traced()):
            x, options = split_call(names, args, kwargs)
            if isinstance(x, Tensor) and fused.accepts(options) and fused.holds():
                output = fused.run(x, options)
        return original.forward(self, *args, **kwargs) if output is None else output

    first = getattr(original, MARK, original)  # `original` may be the class of `lorakit.speed.few_rows`

    def as_original(self: nn.Module, protocol: int) -> Reduced:  # a class created at runtime cannot be imported
        return pickled_as(first, self)

    members: dict[str, Any] = {"forward": forward, "__reduce_ex__": as_original, **more}
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__, MARK: first}
    return type(original.__name__, (original,), members)


def pickled_as(kind: type[nn.Module], module: nn.Module) -> Reduced:
    """Return what makes pickled and copied modules instances of their original class."""
    return _blank, (kind,), {name: value for name, value in vars(module).items() if name not in (RECOMPUTES, DECODES)}


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Create an instance that has no state, without calling `__init__`."""
    return object.__new__(kind)
