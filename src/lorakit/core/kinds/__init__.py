"""The KINDS registry, which defines how A and B are applied to each type of module and what shape B·A has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import nn

from lorakit.architectures.families import TUPLE_ROUTERS
from lorakit.core.kinds.convolution import CONV1, CONV2, CONV3
from lorakit.core.kinds.kind import CONV1D, EMBEDDING, LINEAR, Fits, Kind, WeightSpec, every_kind
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
    """Return the kind that lists the nearest listed ancestor of a module type, or None.

    User-defined kinds (`own`, by name) take precedence over entries in KINDS that list the same ancestor.
    """
    for ancestor in module_type.__mro__:
        dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if dotted in TUPLE_ROUTERS and not any(dotted in kind.types or ancestor in kind.types for kind in own.values()):
            return None  # the module's weight can be adapted as a parameter
        for kind in (*own.values(), *KINDS):
            if ancestor in kind.types or dotted in kind.types:
                return kind
    return None


def kind_named(name: str, own: Mapping[str, Kind] = NONE) -> Kind:
    """Return the user-defined (`own`) or built-in kind with this name; an unknown name is a bug in lorakit."""
    return own[name] if name in own else _NAMED[name]


def checked(kinds: Iterable[Kind]) -> dict[str, Kind]:
    """Return the user-defined kinds keyed by name, with flags that apply only to entries in KINDS cleared.

    Raises:
        ConfigError: An element of `kinds` is not a `Kind`, has a name that is already taken, or lists no module types.
    """
    by_name: dict[str, Kind] = {}
    for kind in kinds:
        if not isinstance(kind, Kind):
            raise ConfigError(
                f"kinds contains {kind!r}; each entry must be a lorakit.core.Kind.", what=kind, field="kinds"
            )
        if kind.name in _NAMED or kind.name in by_name or not kind.types:
            why = "lists no module types" if not kind.types else "has a name that is already taken"
            text = f"kinds: the kind {kind.name!r} {why}. Give it a unique name and list its module types."
            raise ConfigError(text, what=kind.name, field="kinds")
        by_name[kind.name] = dataclasses.replace(kind, is_dense=False, names_parameter=False, read_by_owner=False)
    return by_name


def fits(check: Fits, kind: Kind) -> bool:
    """Return whether an entry in INITS or VARIANTS, with this `fits`, supports a kind.

    User-defined kinds are supported only if the entry's `fits` is `every_kind`.
    """
    return check is every_kind or (kind.name in _NAMED and check(kind))


def check_fits(check: Fits, kind: Kind, path: str, *, what: str, field: str, advice: str) -> None:
    """Raise a ConfigError if an entry in INITS or VARIANTS, with this `fits`, does not support the kind of a site.

    `what` describes the entry and `field` is the config field that selects it; `advice` is an alternative to leaving
    the module out.
    """
    if not fits(check, kind):
        known = [other.name for other in KINDS if check(other)]
        text = (
            f"{path}: {kind.shown_as or kind.name} does not support {what}; {advice}, or leave the module out. "
            f"Supported: {', '.join(known)}."
        )
        raise ConfigError(text, what=kind.name, where=path, field=field, allowed=known)
