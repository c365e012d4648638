"""The registry KINDS: how A and B are applied to each type of module, and the shape of their product."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import nn

from lorakit.core.kinds.convolution import CONV1, CONV2, CONV3
from lorakit.core.kinds.kind import Fits, Kind, WeightSpec, every_kind
from lorakit.core.kinds.linear import CONV1D, EMBEDDING, LINEAR
from lorakit.core.kinds.parameter import ATTENTION, INNER, PARAMETER, parameter_spec, per_expert
from lorakit.errors import ConfigError

__all__ = [
    "INNER",
    "KINDS",
    "PARAMETER",
    "Fits",
    "Kind",
    "WeightSpec",
    "check_fits",
    "checked",
    "fits",
    "kind_named",
    "kind_of",
    "parameter_spec",
    "per_expert",
]

KINDS: tuple[Kind, ...] = (LINEAR, CONV1D, EMBEDDING, CONV1, CONV2, CONV3, ATTENTION, PARAMETER, INNER)

NONE: Mapping[str, Kind] = MappingProxyType({})

_NAMED = {kind.name: kind for kind in KINDS}


def kind_of(module_type: type[nn.Module], own: Mapping[str, Kind] = NONE) -> Kind | None:
    """Return the kind for a type of module, or None; the nearest ancestor that an entry names decides.

    Args:
        module_type: Class of a module of the base.
        own: Kinds that a user defined, by name; for one ancestor they come before the entries of KINDS.
    """
    for ancestor in module_type.__mro__:
        dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if any(dotted in kind.types for kind in KINDS if kind.read_by_owner):
            return None  # its own forward is never called; it comes with the module that reads it
        for kind in (*own.values(), *KINDS):
            if ancestor in kind.types or dotted in kind.types:
                return kind
    return None


def kind_named(name: str, own: Mapping[str, Kind] = NONE) -> Kind:
    """Return the kind with a name, an entry of KINDS or defined by a user; a missing one is a bug in lorakit.

    Args:
        name: Its name.
        own: Kinds that a user defined, by name.
    """
    return own[name] if name in own else _NAMED[name]


def checked(kinds: Iterable[Kind]) -> dict[str, Kind]:
    """Return kinds that a user defined, by name, without the flags that only apply to the module types of KINDS.

    Args:
        kinds: The kinds; `dataclasses.replace` of an entry of KINDS is the simplest way to make one.

    Raises:
        ConfigError: One is not a `Kind`, has a name that is taken, or names no module type.
    """
    found: dict[str, Kind] = {}
    for kind in kinds:
        if not isinstance(kind, Kind):
            raise ConfigError(f"kinds holds {kind!r}; each must be a lorakit.core.Kind.", what=kind, field="kinds")
        if kind.name in _NAMED or kind.name in found or not kind.types:
            why = "names no module type" if not kind.types else "has the name of another one"
            raise ConfigError(
                f"kinds: the kind {kind.name!r} {why}. Give it its own name and types.", what=kind.name, field="kinds"
            )
        found[kind.name] = dataclasses.replace(kind, is_dense=False, names_parameter=False, read_by_owner=False)
    return found


def fits(check: Fits, kind: Kind) -> bool:
    """Return whether an entry of INITS or VARIANTS supports a kind; one for every kind includes those of users.

    Args:
        check: The entry's `fits`.
        kind: The kind.
    """
    return check is every_kind or (kind.name in _NAMED and check(kind))


def check_fits(check: Fits, kind: Kind, path: str, *, what: str, field: str, advice: str) -> None:
    """Reject a kind that an entry of INITS or VARIANTS does not support.

    Args:
        check: The entry's `fits`.
        kind: The kind.
        path: The site.
        what: The entry, for the message.
        field: The config's field that selects it.
        advice: The alternative to leaving the module out.

    Raises:
        ConfigError: The entry does not support the kind.
    """
    if not fits(check, kind):
        known = [other.name for other in KINDS if check(other)]
        raise ConfigError(
            f"{path}: {what} does not support {kind.name}, only {', '.join(known)}. Leave the module out, or {advice}.",
            what=kind.name,
            where=path,
            field=field,
            allowed=known,
        )
