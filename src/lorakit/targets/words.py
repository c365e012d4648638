"""The words of matching: what may be named, what was named, and the two rules for names and patterns.

Name patterns that come from a file: read as words, never run.

`rank_pattern` and `alpha_pattern` are regular expressions in the field's files. One from outside could be made to
run for hours, so only what is a plain name is understood: a path, a dotted suffix, or a whole path after `^`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError, PatternError


@dataclass(frozen=True)
class Candidate:
    """A module that a target may name.

    Attributes:
        path: Dotted path in the model.
        kind: The kind of site it can be ("Linear", "Conv1D", "Embedding", ...), or None where LoRA cannot sit.
        type_name: Class name of the module, for messages.
        dense: It counts for "all-linear" (a dense layer that is not the output head).
        out_features: Width of its output, 0 where it has none.
        in_features: Width of its input (rows of an embedding), 0 where it has none.
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
        name: Its name there.
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
    """A candidate that the config names, with what holds there.

    Attributes:
        path: Dotted path of the module.
        kind: The kind of site.
        rank: Rank at this site, after `rank_pattern`.
        alpha: Alpha at this site, after `alpha_pattern`.
        entry: The target entry that named it.
        parameter: Name of the one parameter of the module that is meant, "" where the kind says.
    """

    path: str
    kind: str
    rank: int
    alpha: float
    entry: str
    parameter: str = ""


@dataclass(frozen=True)
class Unmatched:
    """One entry of a config that names nothing.

    Attributes:
        field: The config's field, such as "target_modules".
        entry: The entry.
        text: A sentence about it, with the nearest names.
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
    """A remark that a person should read.

    Attributes:
        kind: What it is about: "several_modules" or "large_rank"; other modules have kinds of their own.
        text: The remark, a sentence.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Resolution:
    """What a config names in a model.

    Attributes:
        matches: The sites, in the model's order.
        saved: Paths of the modules that `modules_to_save` names.
        missing: Entries that name nothing; empty unless a partial match was allowed.
        notes: Remarks that a person should read, such as one name that matches different modules.
    """

    matches: tuple[Match, ...]
    saved: tuple[str, ...]
    missing: tuple[Unmatched, ...]
    notes: tuple[Note, ...]


def names_path(entry: str, path: str) -> bool:
    """Whether a list entry names a path: the whole path, or its end after a dot."""
    return path == entry or path.endswith("." + entry)


def first_match(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a path, after a dot or from the start.

    Args:
        pattern: Regular expression -> value, in the order they are tried.
        path: Dotted path of a site.
        default: The value where none fits.

    Raises:
        ConfigError: A key is not a regular expression.
    """
    return next((value for key, value in pattern.items() if key_fits(key, path)), default)


def key_fits(key: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` fits a path.

    Raises:
        ConfigError: The key is not a regular expression.
    """
    return compiled(rf"(.*\.)?({key})", "rank_pattern or alpha_pattern", key).fullmatch(path) is not None


def compiled(pattern: str, where: str, given: str | None = None) -> re.Pattern[str]:
    """A pattern, ready to be used.

    Args:
        pattern: A regular expression.
        where: The field it stands in.
        given: What the user wrote, where that differs.

    Raises:
        ConfigError: It is none.
    """
    try:
        return re.compile(pattern)
    except re.error as cause:
        raise ConfigError(
            f"{where}: {given or pattern!r} is not a regular expression ({cause}).", what=given or pattern, field=where
        ) from None


_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_\-]|\\?\.)+\$?")


def literal_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that names a path.

    Args:
        patterns: Pattern -> value, in the order they are tried.
        path: Path of a site.
        default: The value where none names it.

    Raises:
        PatternError: A pattern that is tried is not a plain name.
    """
    for pattern, value in patterns.items():
        if names(pattern, path):
            return value
    return default


def names(pattern: str, path: str) -> bool:
    """Whether a plain pattern names a path.

    Raises:
        PatternError: The pattern is not a plain name.
    """
    if not _PLAIN.fullmatch(pattern):
        raise PatternError(
            f"{pattern!r} is a regular expression, and one from a file is not run. Write names or dotted suffixes."
        )
    word = pattern.removesuffix("$").replace("\\.", ".")
    return path == word[1:] if word.startswith("^") else names_path(word, path)
