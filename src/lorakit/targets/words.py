"""Types of target matching, and the rules for names and patterns.

`rank_pattern` and `alpha_pattern` are regular expressions in PEFT's files. A pattern from an untrusted file could run
for hours, so patterns from files are never run: only plain names are understood (a path, a dotted suffix, or a whole
path after `^`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from lorakit.errors import ConfigError, PatternError

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A module that a target may name.

    Attributes:
        path: Dotted path in the model.
        kind: The kind of site it can be ("Linear", "Conv1D", "Embedding", ...), or None if LoRA does not support it.
        type_name: Class name of the module, for messages.
        dense: Whether it counts for "all-linear" (a dense layer that is not the output head).
        out_features: Output width, or 0 if it has none.
        in_features: Input width (number of embeddings), or 0 if it has none.
    """

    path: str
    kind: str | None
    type_name: str = ""
    dense: bool = False
    out_features: int = 0
    in_features: int = 0


@dataclass(frozen=True)
class BareParameter:
    """A parameter that `target_parameters` may name, such as the experts of a layer in one tensor.

    Attributes:
        module: Path of the module that holds it, "" for the model itself.
        name: Its name in that module.
        shape: Its shape.
    """

    module: str
    name: str
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """Dotted path in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Match:
    """A candidate that the config targets, with its rank and alpha.

    Attributes:
        path: Dotted path of the module.
        kind: The kind of site.
        rank: Rank at this site, after `rank_pattern`.
        alpha: Alpha at this site, after `alpha_pattern`.
        entry: The target entry that named it.
        parameter: Name of the targeted parameter of the module, or "" if the kind determines it.
    """

    path: str
    kind: str
    rank: int
    alpha: float
    entry: str
    parameter: str = ""


@dataclass(frozen=True)
class Unmatched:
    """A config entry that matches nothing.

    Attributes:
        field: The config's field, such as "target_modules".
        entry: The entry.
        text: Message with the nearest names.
    """

    field: str
    entry: str
    text: str

    def __str__(self) -> str:
        return self.text


SEVERAL_MODULES, LARGE_RANK = "several_modules", "large_rank"
"""Kinds of notes about targets."""


@dataclass(frozen=True)
class Note:
    """A remark for the user.

    Attributes:
        kind: Subject: "several_modules" or "large_rank"; other packages add their own.
        text: The message.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Resolution:
    """Result of matching a config against a model.

    Attributes:
        matches: The sites, in the model's order.
        saved: Paths of modules that `modules_to_save` names.
        missing: Entries that match nothing; empty unless partial matches are allowed.
        notes: Remarks for the user, such as a name that matches different modules.
    """

    matches: tuple[Match, ...]
    saved: tuple[str, ...]
    missing: tuple[Unmatched, ...]
    notes: tuple[Note, ...]


def names_path(entry: str, path: str) -> bool:
    """Return whether a list entry names a path: the whole path, or a dotted suffix of it."""
    return path == entry or path.endswith("." + entry)


def first_match(pattern: Mapping[str, T], path: str, default: T) -> T:
    """Return the value of the first pattern that matches a dotted suffix of a path or the whole path.

    Args:
        pattern: Regular expression -> value, in the order they are tried.
        path: Dotted path of a site.
        default: The value if no pattern matches.

    Raises:
        ConfigError: A key is not a regular expression.
    """
    return next((value for key, value in pattern.items() if key_fits(key, path)), default)


def key_fits(key: str, path: str) -> bool:
    """Return whether a key of `rank_pattern` or `alpha_pattern` matches a path.

    Raises:
        ConfigError: The key is not a regular expression.
    """
    return compiled(rf"(.*\.)?({key})", "rank_pattern or alpha_pattern", key).fullmatch(path) is not None


def compiled(pattern: str, where: str, given: str | None = None) -> re.Pattern[str]:
    """Compile a pattern.

    Args:
        pattern: A regular expression.
        where: The field that holds it.
        given: The user's text, if it differs.

    Raises:
        ConfigError: The pattern is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as cause:
        raise ConfigError(
            f"{where}: {given or pattern!r} is not a regular expression ({cause}).", what=given or pattern, field=where
        ) from None


_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_\-]|\\?\.)+\$?")


def literal_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Return the value of the first pattern that names a path.

    Args:
        patterns: Pattern -> value, in the order they are tried.
        path: Path of a site.
        default: The value if no pattern names it.

    Raises:
        PatternError: A pattern is not a plain name.
    """
    for pattern, value in patterns.items():
        if names(pattern, path):
            return value
    return default


def names(pattern: str, path: str) -> bool:
    """Return whether a plain pattern names a path.

    Raises:
        PatternError: The pattern is not a plain name.
    """
    if not _PLAIN.fullmatch(pattern):
        raise PatternError(
            f"{pattern!r} is a regular expression; patterns from files are not run. Use names or dotted suffixes."
        )
    word = pattern.removesuffix("$").replace("\\.", ".")
    return path == word[1:] if word.startswith("^") else names_path(word, path)
