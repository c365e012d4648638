"""Whether values are of the types that a config's fields are annotated with; what is not is named.

A program may give tuples or sets for lists, and a file gives lists for tuples; a whole number is a number, true and
false are neither, and nothing (null) is as good as false. Knows nothing of any field but its annotation.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from lorakit.errors import ConfigTypeError

_PLAIN: Mapping[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: ((str, os.PathLike), "text"),
    type(None): (type(None), "nothing"),
}


def check_types(config: Any, leave: Collection[str] = ()) -> None:
    """Refuse the fields of a dataclass that hold what their annotation does not allow.

    Args:
        config: An instance.
        leave: Names of fields that are checked elsewhere.

    Raises:
        ConfigTypeError: The first such field, what it holds and what it should.
    """
    for name, hint in _hints(config.__class__).items():
        value = getattr(config, name)
        if name not in leave and not _fits(value, hint):
            raise ConfigTypeError(f"{name} is {value!r}; it must be {_words(hint)}.")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Field -> its annotation, of what lorakit itself defines; a user's subclass may have fields of its own."""
    ours = next(part for part in kind.__mro__ if part.__module__.partition(".")[0] == "lorakit")
    hints = typing.get_type_hints(ours)
    return {field.name: hints[field.name] for field in dataclasses.fields(ours)}


def plain(value: Any) -> Any:
    """A value as a file can hold it: numbers of other libraries as Python's, ranges, arrays and generators as lists.

    Args:
        value: Of a field; lists, tuples, sets and tables stay what they are, with plain entries, and are copied.
    """
    if value is None or isinstance(value, (bool, str, bytes)):
        return value
    if isinstance(value, (numbers.Integral, numbers.Real)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return set(value)
    if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return value
    entries = [plain(entry) for entry in value]
    return tuple(entries) if isinstance(value, tuple) else entries


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inside)
    if hint in _PLAIN:
        if hint is bool:
            return value is None or isinstance(value, bool)
        return isinstance(value, _PLAIN[hint][0]) and not isinstance(value, bool)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items())
    if origin in (list, set, tuple):
        plain = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        fixed = origin is tuple
        return plain and (not fixed or len(value) == len(inside)) and all(_fits(entry, inside[0]) for entry in value)
    return isinstance(value, hint)


def _words(hint: Any, many: bool = False) -> str:
    """An annotation in words: "a list of whole numbers, or nothing"."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_words(option) for option in inside))
    if hint in _PLAIN:
        said = _PLAIN[hint][1]
        return f"{said.removeprefix('a ')}s" if many else said
    if origin is dict:
        return "a table of " + ("anything" if inside[1] is Any else _words(inside[1], many=True))
    if origin is tuple:
        return f"{'lists' if many else 'a list'} of {len(inside)} {_words(inside[0], many=True)}"
    if origin in (list, set):
        return f"{'lists' if many else 'a list'} of {_words(inside[0], many=True)}"
    return f"a {getattr(hint, '__name__', hint)}"
