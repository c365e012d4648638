"""Name patterns that come from a file: read as words, never run.

`rank_pattern` and `alpha_pattern` are regular expressions in the field's files. One from outside could be made to
run for hours, so only what is a plain name is understood: a path, a dotted suffix, or a whole path after `^`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.errors import PatternError
from lorakit.targets import names_path

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
