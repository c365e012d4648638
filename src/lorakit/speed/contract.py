"""Contracts: what a fused `forward` assumes about the modules that it bypasses.

A fused `forward` checks its contract on every call.

A fused `forward` is valid only while two conditions hold. First, the modules that it bypasses are the ones that were
probed. Second, nothing has changed in the settings of these modules, in their `forward` methods, or in the functions
that these methods call. This Python module does not depend on any particular fused `forward`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

from lorakit.speed.patching import children_of, original_class
from lorakit.targets.layer_types import CONV1D

MISSING = object()
"""Placeholder for the value of a key that is missing from a dictionary."""

SETTINGS = (bool, int, float, str, type(None))
"""Types of the attributes whose values are compared."""

ASKED = frozenset({"training", "gradient_checkpointing", "p", "dropout", "attention_dropout"})
"""Attributes that are not compared: fused `forward` methods read them at each call, or no `forward` uses them."""

IN_CONFIG = ("_attn_implementation_internal", "is_causal")
"""Config fields that are read by functions that a `forward` calls, rather than by the `forward` itself."""

INTERFACES = "ALL_ATTENTION_FUNCTIONS"
"""Global variable in modeling files that maps the names of attention implementations to functions."""


Fact = tuple[Mapping[str, Any], str, object]
"""A dictionary entry that a fused `forward` relies on: the dictionary, the key, and the value (MISSING if absent).

The dictionary is the `__dict__` of a module, class, config or Python file, or contains a module's children by name.
"""


@dataclass(frozen=True, eq=False)
class Contract:
    """Facts that a fused `forward` relies on.

    Attributes:
        facts: Dictionary entries that must not change. Settings are compared by type and value;
            all other values are compared by identity.
    """

    facts: tuple[Fact, ...]

    def holds(self) -> bool:
        """Return whether all facts still hold and no global module hook is registered."""
        for table, name, value in self.facts:
            found = table.get(name, MISSING)
            if found is not value and not _is_equal_setting(found, value):
                return False
        return not torch_modules._has_any_global_hook()


def contract_for(module: nn.Module, fused: Collection[int] | None) -> Contract:
    """Collect the facts that a module's fused `forward` currently relies on.

    Args:
        module: The module's replacement; it and the replacements of its children must already be installed.
        fused: The `id`s of the fused modules, or None if the fused `forward` bypasses everything inside the module.
    """
    facts: list[Fact] = [*_of_module(module)]
    for holder, name, child in bypassed_modules(module, fused):
        if is_operand(child):
            facts += _of_class(_base_class(child))
        else:
            facts += [(holder._modules, name, child), *_of_module(child)]
    return Contract(tuple({(id(table), name): (table, name, value) for table, name, value in facts}.values()))


def is_operand(module: nn.Module) -> bool:
    """Return whether a module is linear, with or without adapters.

    Fused `forward` methods look up linear modules on each call.

    Args:
        module: Any module.
    """
    return _is_around_base(module) or isinstance(module, nn.Linear) or type(module).__name__ == CONV1D


def bypassed_modules(module: nn.Module, fused: Collection[int] | None) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name, child) for each module that the fused `forward` of a module bypasses.

    Args:
        module: The module.
        fused: The `id`s of the modules whose children are bypassed too, or None for all modules.
    """
    if _is_around_base(module):
        return
    for name, child in children_of(module).items():
        yield module, name, child
        if fused is None or id(child) in fused:
            yield from bypassed_modules(child, fused)


def is_own_forward(kind: type[nn.Module]) -> bool:
    """Return whether the `forward` of a class was written for that class or a parent class.

    The result is false if the `forward` of an unrelated class, or some other function, was assigned to the class. The
    result is true if a parent class assigned its own `forward` to the class, as gradient checkpointing in transformers
    does.

    Args:
        kind: A module class.
    """
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = vars(owner)["forward"]
    if owner is nn.Module:
        return True  # a module without a `forward` is never called
    package = package_of(forward)
    return any(
        package == base.__module__.partition(".")[0] and forward.__qualname__ == f"{base.__qualname__}.forward"
        for base in owner.__mro__
    )


def package_of(function: Callable[..., Any]) -> str:
    """Return the top-level package in which a function was defined, according to its globals, or "" if unknown.

    Args:
        function: Any callable.
    """
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]


def forward_code(kind: type[nn.Module]) -> CodeType | None:
    """Return the code object of a class's `forward` without decorators, or None if `forward` has no Python code.

    Args:
        kind: A module class.
    """
    return getattr(inspect.unwrap(kind.forward), "__code__", None)


def names_read(kind: type[nn.Module]) -> set[str]:
    """Return all names and string constants in the code of a class's `forward`.

    Args:
        kind: A module class.
    """
    code = forward_code(kind)
    return set() if code is None else {*code.co_names, *(one for one in code.co_consts if isinstance(one, str))}


def _of_module(module: nn.Module) -> Iterator[Fact]:
    kind, own = original_class(module), vars(module)
    yield from _of_class(kind)
    if _is_around_base(module):  # attaching or removing adapters changes the layer's settings
        yield from _of_class(_base_class(module))
        return
    for name, value in own.items():
        if name[0] != "_" and name not in ASKED and isinstance(value, SETTINGS):
            yield own, name, value
    config = own.get("config")
    if config is not None:
        yield own, "config", config
        fields = vars(config)
        for name in {*IN_CONFIG, *(names_read(kind) & fields.keys() - own.keys())}:
            yield fields, name, fields.get(name, MISSING)
        yield from _of_interface(kind, fields.get(IN_CONFIG[0]))


def _is_around_base(module: nn.Module) -> bool:
    """Return whether a module is an adapter layer around a base layer."""
    return "base_layer" in module._modules


def _base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module or, for an adapter layer, the class of its innermost base layer."""
    while (base := module._modules.get("base_layer")) is not None:
        module = base
    return original_class(module)


def _of_class(kind: type[nn.Module]) -> Iterator[Fact]:
    for base in kind.__mro__:
        yield vars(base), "forward", vars(base).get("forward", MISSING)
        if "forward" in vars(base):
            break
    code, known = forward_code(kind), _globals(kind)
    for name in () if code is None else code.co_names:
        if name in known and not isinstance(known[name], ModuleType):
            yield known, name, known[name]


def _globals(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the globals that a class's `forward` reads."""
    return getattr(inspect.unwrap(kind.forward), "__globals__", {})


def _of_interface(kind: type[nn.Module], implementation: str | None) -> Iterator[Fact]:
    table = _globals(kind).get(INTERFACES)
    if isinstance(table, Mapping) and implementation is not None:
        yield table, implementation, table.get(implementation, MISSING)


def _is_equal_setting(found: object, value: object) -> bool:
    return type(found) is type(value) and isinstance(value, SETTINGS) and bool(found == value)
