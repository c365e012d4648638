"""Identify what a module class computes: a digest of its `forward` and of everything that `forward` resolves.

Two classes with the same digest run the same code, whatever their names are; transformers copies the code of many
models from others. A fused `forward` runs only for classes whose digests `lorakit.architectures.known_forwards` lists.

The digest covers the `forward` of a class, the methods that it calls on the module, and the functions, constants and
attention implementations in transformers that these read as globals or closures. It covers neither torch nor child
modules, which have classes of their own. The source of peft's layers is followed too: it is in no table, but it must be
peft's own, and it must not change.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from lorakit.identity.source import source_of

MARK = "_replaced_class"
"""Class attribute that contains the class of the original module; only classes of replacements have it."""

ROOTS = ("forward", "__call__", "__getattr__", "__getattribute__")
"""Methods that run when a module is called."""

IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that a fused `forward` may equal."""

IMPLEMENTATIONS_OF_EXPERTS = ("grouped_mm", "batched_mm")
"""Experts implementations that compute the same as a class's own `forward`."""

OPTIONAL_ROOTS = ("_apply_gate",)
"""Methods of experts that a fast path calls, whether or not `forward` does."""

SET_FOR_CHECKPOINTING = frozenset({"_gradient_checkpointing_func"})
"""Functions that a module stores while gradient checkpointing is on. They run around its `forward`, fused or not."""

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype)

FLAG = "is_"
"""Start of the names of boolean globals whose values depend on the machine and on the version of torch.

They select between ways to compute the same result, so their values are not part of a digest.
"""

FOLLOWED = ("transformers", "peft")
"""Packages whose functions are followed."""

KNOWN = (
    "torch",
    "math",
    "builtins",
    "functools",
    "operator",
    "typing",
    "collections",
    "inspect",
    "warnings",
    "os",
    "enum",
    "contextlib",
)
"""Packages whose functions are taken as given."""

KERNELS = "kernels"
"""Package whose wrappers run the functions of transformers that they contain, until `kernelize` replaces these."""

KERNEL_FUNCTIONS = "_kernel_funcs"
"""Attribute of a module with such a wrapper: a dict from the name of each function to a wrapper for this module."""


class Unknown(Exception):
    """The source that a class runs cannot be determined, for the short reason `why`."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


Fact = tuple[Mapping[str, Any], str, object]
"""A dictionary entry that a fused `forward` relies on: the dictionary, the key, and the value (MISSING if absent).

The dictionary is the `__dict__` of a module, class, config or Python file, or contains a module's children by name.
"""

MISSING = object()
"""Placeholder for the value of a key that is missing from a dictionary."""


@dataclass
class Identity:
    """Result of following the functions that a module class runs.

    Attributes:
        digest: 16 hexadecimal digits, or "" if the class cannot be identified.
        functions: Dict from the qualified name of each function in transformers to the hash of its source.
        reads: Attributes and string constants in these functions: among them are all attributes that they read.
        facts: Dictionary entries that these functions were resolved from.
    """

    digest: str = ""
    why: str = ""
    functions: dict[str, str] = field(default_factory=dict)
    reads: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    facts: list[Fact] = field(default_factory=list)
    live: list[FunctionType] = field(default_factory=list)


class Identities:
    """Identities of the modules of one model; `tables` has a view of each class's attributes."""

    def __init__(self) -> None:
        self.tables: dict[type, Mapping[str, Any]] = {}
        self._known: dict[tuple[type[nn.Module], tuple[tuple[str, object], ...]], Identity] = {}

    def of(self, module: nn.Module) -> Identity:
        """Return what a module, or a replacement's original, computes: its class, and functions in its attributes."""
        kind = original_class(module)
        if any("forward" in vars(function) for function in kernel_functions(module).values()):
            return Identity(why="kernelize replaced functions that it calls")
        base = self.of_class(kind)
        stored = [(name, value) for name, value in vars(module).items() if is_stored_function(base, name, value)]
        return self._of(kind, tuple(sorted(stored))) if stored else base

    def of_forward(self, kind: type[nn.Module]) -> Identity:
        """Return what a model class's `forward` computes apart from its calls, if only its end is bypassed."""
        identity = Identity()
        owner = next(owner for owner in kind.__mro__ if "forward" in vars(owner))
        identity.facts.append(self.fact(owner, "forward"))
        function = vars(owner)["forward"]
        while isinstance(function, FunctionType) and package_of(function) == "transformers":
            identity.live.append(function)
            if not hasattr(function, "__wrapped__"):
                source = source_of(function)
                if source is not None:
                    identity.digest = _digest(source.hash, repr(function.__defaults__))
                    identity.functions[f"{function.__module__}:{function.__qualname__}"] = source.hash
                break
            function = function.__wrapped__
        identity.why = "" if identity.digest else f"the source of {kind.__name__}.forward is not available"
        return identity

    def fact(self, owner: type, name: str) -> Fact:
        """Return the entry of an attribute in the dictionary of a class."""
        table = self.tables.setdefault(owner, vars(owner))  # each call of vars returns a new view of a class
        return table, name, table[name]

    def of_function(self, function: object) -> Identity:
        """Return what a function from transformers computes."""
        return self._followed(nn.Module, lambda resolver: [resolver.value("function", function)])

    def of_class(self, kind: type[nn.Module]) -> Identity:
        """Return what a module class, not that of a replacement, computes."""
        return self._of(kind, ())

    def _of(self, kind: type[nn.Module], stored: tuple[tuple[str, object], ...]) -> Identity:
        def parts(resolver: _Resolver) -> list[str]:
            roots = (*ROOTS, *(name for name in OPTIONAL_ROOTS if hasattr(kind, name)))
            methods = [f"{name}={resolver.method(name)}" for name in roots]
            return methods + [f"self.{name}={resolver.value(name, value)}" for name, value in stored]

        key = (kind, stored)
        if key not in self._known:
            self._known[key] = self._followed(kind, parts)
        return self._known[key]

    def _followed(self, kind: type[nn.Module], parts: Callable[[_Resolver], list[str]]) -> Identity:
        """Return what a class computes, given a function that returns texts of what a resolver has followed."""
        identity = Identity()
        try:
            identity.digest = _digest(*parts(_Resolver(kind, identity, self)))
        except Unknown as failed:
            identity.why = failed.why
        return identity


def kernel_functions(module: nn.Module) -> dict[str, nn.Module]:
    """Return what runs instead of functions that a `forward` calls, by name; `kernelize` sets their `forward`."""
    found: dict[str, nn.Module] = vars(module).get(KERNEL_FUNCTIONS, {})
    return found


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module or, if the module is a replacement, the class of the original."""
    return getattr(type(module), MARK, type(module))


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether the class of a module, or of its original, computes what `nn.Linear` does."""
    return original_class(module).forward is nn.Linear.forward


def is_stored_function(identity: Identity, name: str, value: object) -> bool:
    """Return whether an attribute of a module is a function that its class's source may call."""
    is_function = callable(value) and not isinstance(value, (nn.Module, type))
    return is_function and name in identity.reads and name not in SET_FOR_CHECKPOINTING


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class _Resolver:
    """Follow the functions that a class runs.

    Attributes:
        digests: Dict from the id of a function to its digest; "…" while the function is being followed.
    """

    def __init__(self, kind: type[nn.Module], found: Identity, cache: Identities) -> None:
        self.kind = kind
        self.found = found
        self.cache = cache
        self.digests: dict[int, str] = {}

    def method(self, name: str) -> str:
        """Return a text that identifies all definitions of a method in a class and its parents, outside torch."""
        definitions = []
        for owner in self.kind.__mro__:
            if name not in vars(owner):
                continue
            value = vars(owner)[name]
            self.found.facts.append(self.cache.fact(owner, name))
            if package_of(owner) == "torch":
                if not _is_of(owner, value):
                    raise Unknown(f"{owner.__name__}.{name} was replaced")
                definitions.append(f"torch.{owner.__name__}")
                break
            definitions.append(self.value(name, value))
        return ";".join(definitions)

    def value(self, name: str, value: Any, attributes: frozenset[str] = frozenset()) -> str:
        """Return a text that identifies a value read as `name` whose `attributes` are read, or raise `Unknown`."""
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        if isinstance(value, FunctionType):
            return self.function(value)
        if isinstance(value, bool) and name.lstrip("_").startswith(FLAG):
            return name
        if isinstance(value, CONSTANTS):
            return repr(value)
        if isinstance(value, type):
            return self.type(value)
        if isinstance(value, ModuleType):
            return self.module(value, attributes)
        parts = _parts(value)
        if parts is not None:
            return f"{type(value).__name__}({','.join(self.value(name, one) for one in parts)})"
        return self.object(name, value, attributes)

    def function(self, function: FunctionType) -> str:
        """Return the digest of a function, or its name if it was defined in a package whose functions are known."""
        package = package_of(function)
        if package in KNOWN:
            return f"{package}.{function.__qualname__}"
        if package == KERNELS:
            return self.wrapped(function, "orig_forward")
        if package not in FOLLOWED:
            raise Unknown(f"{function.__qualname__} was defined in {package or 'an unknown package'}")
        known = self.digests.get(id(function))
        if known is not None:
            return known
        self.digests[id(function)] = "…"
        code, source = function.__code__, source_of(function)
        if source is None:
            raise Unknown(f"the source of {function.__qualname__} is not available")
        self.found.functions[f"{function.__globals__['__name__']}:{_name_of(function)}"] = source.hash
        self.found.reads |= source.words
        self.found.fields |= source.fields
        self.found.live.append(function)
        parts = [source.hash, repr(function.__defaults__), repr(sorted((function.__kwdefaults__ or {}).items()))]
        for name, value, table in sorted(_resolved(function, source.variables), key=lambda one: one[0]):
            read = frozenset(attribute for variable, attribute in source.attributes if variable == name)
            if table is not None:
                self.found.facts.append((table, name, value))
            parts.append(f"{name}={self.value(name, value, read)}")
        first = code.co_varnames[:1]
        own_methods = {attribute for variable, attribute in source.attributes if variable in (*first, "super")}
        parts += [f"self.{name}={self.method(name)}" for name in sorted(own_methods) if self._is_method(name)]
        self.digests[id(function)] = digest = _digest(*parts)
        return digest

    def wrapped(self, wrapper: FunctionType, name: str) -> str:
        """Return the digest of the function that a wrapper from `kernels` runs, its variable `name`."""
        code = wrapper.__code__
        closure = dict(zip(code.co_freevars, wrapper.__closure__ or (), strict=True))
        if name not in closure:
            raise Unknown(f"{wrapper.__qualname__} was defined in {KERNELS}")
        self.found.live.append(wrapper)
        return self.value(name, contents_of(closure[name]))

    def _is_method(self, name: str) -> bool:
        """Return whether a name is a method or property that a class outside torch defines."""
        owners = [owner for owner in self.kind.__mro__ if name in vars(owner)]
        kinds = (FunctionType, staticmethod, classmethod, property, functools.partial)
        return bool(owners) and package_of(owners[0]) != "torch" and isinstance(vars(owners[0])[name], kinds)

    def type(self, kind: type) -> str:
        """Return the name of a class."""
        package = package_of(kind)
        if package not in (*KNOWN, *FOLLOWED):
            raise Unknown(f"it uses {kind.__name__} from {package}")
        return f"{package}.{kind.__name__}"

    def module(self, module: ModuleType, attributes: frozenset[str]) -> str:
        """Return the name of a Python module, and what is read from it if its functions are followed."""
        package = module.__name__.partition(".")[0]
        if package not in FOLLOWED:
            return module.__name__
        read = sorted(name for name in attributes if name in vars(module))
        for name in read:
            self.found.facts.append((vars(module), name, vars(module)[name]))
        return f"{package}({','.join(f'{name}={self.value(name, vars(module)[name])}' for name in read)})"

    def object(self, name: str, value: Any, attributes: frozenset[str]) -> str:
        """Return a text that identifies an instance: its class, and the implementations that a registry contains."""
        kind = type(value)
        package = package_of(kind)
        if isinstance(value, logging.Logger):
            return "logger"
        if isinstance(value, nn.Module) and package_of(kind.forward) == KERNELS:
            self.found.facts += [self.cache.fact(kind, "forward"), (vars(value), "forward", MISSING)]
            return self.wrapped(kind.forward, "func")
        if package == "transformers" and isinstance(value, Mapping):
            return self.registry(value, attributes)
        if package in ("packaging", "inspect"):
            return kind.__name__
        if isinstance(value, BuiltinFunctionType) or (callable(value) and package in KNOWN):
            return getattr(value, "__qualname__", kind.__name__)
        raise Unknown(f"it reads {name}, a {kind.__name__}")

    def registry(self, registry: Mapping[str, Any], attributes: frozenset[str]) -> str:
        """Return a text that identifies the implementations in a registry, and how they are looked up."""
        dicts = list(_dicts_of(registry))
        of_experts = (name for name in IMPLEMENTATIONS_OF_EXPERTS if any(name in table for table in dicts))
        names = (*IMPLEMENTATIONS, *of_experts)
        self.found.facts += [(table, name, table.get(name, MISSING)) for table in dicts for name in names]
        parts = [type(registry).__name__]
        for name in names:
            function = next((table[name] for table in dicts if name in table), None)
            parts.append(f"{name}={'' if function is None else self.value(name, function)}")
        for name in sorted({*attributes, "__getitem__"}):
            for owner in type(registry).__mro__:
                if name in vars(owner) and package_of(owner) == "transformers":
                    self.found.facts.append(self.cache.fact(owner, name))
                    parts.append(self.value(name, vars(owner)[name]))
        return f"registry({','.join(parts)})"


def _parts(value: Any) -> tuple[Any, ...] | None:
    """Return what a value consists of in a fixed order, or None if it is not a collection, property or partial."""
    if isinstance(value, property):
        return (value.fget, value.fset, value.fdel)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *(one for pair in sorted(value.keywords.items()) for one in pair))
    if isinstance(value, (set, frozenset)) and all(isinstance(one, str) for one in value):
        return tuple(sorted(value))
    return tuple(value) if type(value) in (tuple, list) else None


def _dicts_of(registry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the dictionaries in which a registry and its classes store their entries, in order of lookup."""
    for holder in (registry, *type(registry).__mro__):
        yield from (
            (value for value in vars(holder).values() if isinstance(value, dict)) if hasattr(holder, "__dict__") else ()
        )


def _resolved(function: FunctionType, names: frozenset[str]) -> Iterator[tuple[str, Any, Mapping[str, Any] | None]]:
    """Yield (name, value, dictionary) for each closure, whose dictionary is None, and global that a function reads."""
    code = function.__code__
    closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    for name in names - {*code.co_varnames, *code.co_cellvars}:
        if name in closure:
            if name != "__class__":
                yield name, contents_of(closure[name]), None
        elif name in function.__globals__:
            yield name, function.__globals__[name], function.__globals__


def contents_of(cell: CellType) -> object:
    """Return the value of a variable of an enclosing function, an item of `__closure__`, or MISSING if it has none."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _name_of(function: FunctionType) -> str:
    """Return the qualified name of a function, or the own name of a wrapper, which is named like what it wraps."""
    is_wrapper = hasattr(function, "__wrapped__") and not function.__qualname__.endswith(function.__code__.co_name)
    return function.__code__.co_name if is_wrapper else function.__qualname__


def package_of(value: type | Callable[..., Any]) -> str:
    """Return the top-level package in which a class or function was defined, or "" if unknown.

    A function's globals are used instead of its `__module__`, which a decorator copies from the function that it wraps.
    """
    if isinstance(value, type):
        return value.__module__.partition(".")[0]
    return str(getattr(value, "__globals__", {}).get("__name__", "")).partition(".")[0]


def _is_of(owner: type, value: Any) -> bool:
    """Return whether a method of a torch class was defined in torch, for this class."""
    function = getattr(value, "__func__", value)
    return package_of(function) == "torch" or not isinstance(function, FunctionType)
