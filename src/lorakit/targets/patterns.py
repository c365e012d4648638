r"""Names and patterns of paths: entries of target lists, and keys of rank and alpha patterns.

In PEFT's files, the keys of `rank_pattern` and `alpha_pattern` are regular expressions. Evaluating one from an
untrusted file could take hours, so only plain names are supported in files: a path, a dotted suffix of a path, `^`
followed by a full path, or `.*\.` followed by a dotted suffix of a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lorakit.errors import ConfigError, PatternError

T = TypeVar("T")


def names_path(entry: str, path: str) -> bool:
    """Return whether a list entry names a path, in full or by a dotted suffix."""
    return path == entry or path.endswith("." + entry)


def first_match(pattern: Mapping[str, T], path: str, default: T) -> T:
    """Return the value of the first pattern, a regular expression, that matches a path or a dotted suffix of it."""
    return next((value for key, value in pattern.items() if key_fits(key, path)), default)


def key_fits(key: str, path: str) -> bool:
    """Return whether a key of `rank_pattern` or `alpha_pattern` matches a path."""
    return compiled(rf"(.*\.)?({key})", "rank_pattern or alpha_pattern", key).fullmatch(path) is not None


def exact_key(path: str, paths: Iterable[str]) -> str:
    """Return a key for `rank_pattern` that matches only this one of the paths, if possible a plain one."""
    escaped = re.escape(path).replace("\\-", "-")  # names in files must not contain escaped hyphens
    plain = escaped.replace("\\.", ".") == path and all(p == path or not key_fits(path, p) for p in paths)
    return path if plain else f"^{escaped}"


def compiled(pattern: str, where: str, written: str | None = None) -> re.Pattern[str]:
    """Compile a pattern of the field `where`, in messages as `written`; a ConfigError if it is not valid."""
    try:
        return re.compile(pattern)
    except re.error as cause:
        text = f"{where}: {written or pattern!r} is not a valid regular expression ({cause})."
        raise ConfigError(text, what=written or pattern, field=where) from None


_ANY_PARENT = r".*\."
"""Beginning of the patterns that PEFT writes for fused experts: any parent path, then a plain name."""

_PLAIN = re.compile(r"(?:\^|\.\*\\\.)?(?:[A-Za-z0-9_\-]|\\?\.)+\$?")


def literal_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Return the value of the first pattern, a plain name, that names a path; otherwise the default."""
    return next((value for pattern, value in patterns.items() if names(pattern, path)), default)


def names(pattern: str, path: str) -> bool:
    """Return whether a plain-name pattern matches a path; a PatternError if it is not a plain name."""
    if not _PLAIN.fullmatch(pattern):
        text = f"{pattern!r} is a regular expression; those in files are never evaluated. Use names or dotted suffixes."
        raise PatternError(text, what=pattern)
    word = pattern.removeprefix(_ANY_PARENT).removesuffix("$").replace("\\.", ".")
    if pattern.startswith(_ANY_PARENT):
        return path.endswith(f".{word}")
    return path == word[1:] if word.startswith("^") else names_path(word, path)
