"""Every error that lorakit raises on purpose, each with a stable code.

    LorakitError                     LORA-E000
    ├─ ConfigError (ValueError)      LORA-E010   a field of a config or setting is not allowed
    │  ├─ UsageError                 LORA-E011   the command line or call cannot be carried out as asked
    │  └─ ConfigTypeError (TypeError) LORA-E012  a field or setting is of a type that is not allowed
    ├─ TargetError (ValueError)      LORA-E020   a target list matches nothing, or only in part
    ├─ AdapterError (ValueError)     LORA-E030   no such adapter, a name that cannot be used, a name in use
    ├─ RouteError (RuntimeError)     LORA-E040   which adapter a row uses is not known, or cannot be had here
    ├─ MergeError (RuntimeError)     LORA-E050   merging or unmerging is not possible as asked
    ├─ AdapterFileError (ValueError) LORA-E060   files of an adapter are missing, damaged or do not fit
    │  ├─ BaseMismatchError          LORA-E061   the adapter was made on another base
    │  └─ PatternError               LORA-E062   a name pattern from a file is a regular expression, which is not run
    ├─ ModelError (ValueError)       LORA-E070   a model or tokenizer cannot be found or used
    ├─ DataError (ValueError)        LORA-E080   training data cannot be read or used
    ├─ RunError (RuntimeError)       LORA-E090   a run folder or checkpoint cannot be used, or a run cannot go on
    │  └─ NonFiniteError             LORA-E091   a loss or gradient became NaN or infinite
    ├─ DiskError (OSError)           LORA-E100   a file could not be written
    ├─ MissingExtra (ImportError)    LORA-E110   an optional package is not installed
    └─ NotYetSupported (NotImplementedError) LORA-E120   known, but not built yet

A message says what is wrong, where (path, tensor, field, expected, actual) and what to do.
This module imports nothing of lorakit.
"""

from __future__ import annotations

from typing import ClassVar


class LorakitError(Exception):
    """Root of the tree; catch it to catch every refusal of lorakit.

    Attributes:
        code: Stable name of the class of error, for programs and logs.
        exit_code: What the command line exits with: 1 failed, 2 used wrongly.
    """

    code: ClassVar[str] = "LORA-E000"
    exit_code: ClassVar[int] = 1


class ConfigError(LorakitError, ValueError):
    """A field of a config or setting holds a value that is not allowed."""

    code = "LORA-E010"
    exit_code = 2


class UsageError(ConfigError):
    """The command line or call cannot be carried out as asked."""

    code = "LORA-E011"


class ConfigTypeError(ConfigError, TypeError):
    """A field of a config or setting is of a type that is not allowed."""

    code = "LORA-E012"


class TargetError(LorakitError, ValueError):
    """A target list matches nothing, or only in part."""

    code = "LORA-E020"


class AdapterError(LorakitError, ValueError):
    """No such adapter, a name that cannot be used, or a name already in use."""

    code = "LORA-E030"


class RouteError(LorakitError, RuntimeError, ValueError):
    """Which adapter a row uses is not known, or cannot be had at this site."""

    code = "LORA-E040"


class MergeError(LorakitError, RuntimeError, ValueError):
    """Merging or unmerging is not possible as asked; programs of the field catch either builtin."""

    code = "LORA-E050"


class AdapterFileError(LorakitError, ValueError):
    """The files of an adapter are missing, damaged, or do not fit the model."""

    code = "LORA-E060"


class BaseMismatchError(AdapterFileError):
    """The adapter was made on another base model."""

    code = "LORA-E061"


class PatternError(AdapterFileError):
    """A name pattern from a file is a regular expression, which is not run."""

    code = "LORA-E062"


class ModelError(LorakitError, ValueError):
    """A model or its tokenizer cannot be found or used."""

    code = "LORA-E070"


class DataError(LorakitError, ValueError):
    """Training or evaluation data cannot be read or used."""

    code = "LORA-E080"


class RunError(LorakitError, RuntimeError):
    """A run folder or checkpoint cannot be used, or a run cannot go on."""

    code = "LORA-E090"


class NonFiniteError(RunError):
    """A loss or gradient became NaN or infinite."""

    code = "LORA-E091"


class DiskError(LorakitError, OSError):
    """A file could not be written; what stood there before still stands."""

    code = "LORA-E100"


class MissingExtra(LorakitError, ImportError):
    """An optional package is not installed; the message holds the pip command that mends it."""

    code = "LORA-E110"


class NotYetSupported(LorakitError, NotImplementedError):
    """A known idea that lorakit does not build yet; the message names the field."""

    code = "LORA-E120"


def warn_caller(sentence: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside lorakit that led here, however many of our own calls lie between.

    Args:
        sentence: What a person should read.
        category: Class of the warning.
    """
    import sys
    import warnings

    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "lorakit":
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, category, stacklevel=level)


_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # controls, escape among them: their pictures
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    # what separates lines and paragraphs or changes the direction of text
    **{code: f"\\u{code:04x}" for code in (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))},
}
_SHOWN_IN_TEXT = {code: shown for code, shown in _SHOWN.items() if chr(code) not in "\n\t"}


def printable(text: str, one_line: bool = False) -> str:
    """Return text in which characters that command a terminal are visible: escape becomes "\u241b".

    Names and values from files can hold any character. Everything that the command line prints goes through here.

    Args:
        text: Any text.
        one_line: Make line feeds and tabs visible too.
    """
    encodable = text.encode("utf-8", "backslashreplace").decode()  # JSON can hold half a surrogate pair
    return encodable.translate(_SHOWN if one_line else _SHOWN_IN_TEXT)


def nearest(word: str, candidates: list[str], count: int = 3) -> list[str]:
    """The candidates closest in spelling to a word, best first, for use in messages.

    Args:
        word: What the user wrote.
        candidates: What would have been allowed.
        count: At most so many.

    Returns:
        Up to `count` candidates, possibly none.
    """
    import difflib

    return difflib.get_close_matches(word, candidates, n=count, cutoff=0.5)
