"""Every error that lorakit raises on purpose, each with a stable code.

    LorakitError                     LORA-E000
    ├─ ConfigError (ValueError)      LORA-E010   a field of a config or setting is not allowed
    │  ├─ UsageError                 LORA-E011   the command line or call cannot be carried out as asked
    │  └─ ConfigTypeError (TypeError) LORA-E012  a field or setting is of a type that is not allowed
    ├─ TargetError (ValueError)      LORA-E020   a target list matches nothing, or only in part
    │  └─ NoTargetError              LORA-E021   no module or table that a config names is in the model
    ├─ AdapterError (ValueError)     LORA-E030   no such adapter, a name that cannot be used, a name in use
    ├─ RouteError (RuntimeError)     LORA-E040   which adapter a row uses is not known, or cannot be had here
    │  ├─ RowCountError              LORA-E041   a route and a batch have different numbers of rows
    │  └─ MixedRowsError             LORA-E042   a module cannot run rows of different adapters in one batch
    ├─ MergeError (RuntimeError)     LORA-E050   merging or unmerging is not possible as asked
    ├─ AdapterFileError (ValueError) LORA-E060   files of an adapter are missing, damaged or do not fit
    │  ├─ BaseMismatchError          LORA-E061   the adapter was made on another base
    │  ├─ PatternError               LORA-E062   a name pattern from a file is a regular expression, which is not run
    │  └─ ShapeMismatchError         LORA-E063   tensors of an adapter have other shapes than the model needs
    ├─ ModelError (ValueError)       LORA-E070   a model or tokenizer cannot be found or used
    ├─ DataError (ValueError)        LORA-E080   training data cannot be read or used
    ├─ RunError (RuntimeError)       LORA-E090   a run folder or checkpoint cannot be used, or a run cannot go on
    │  └─ NonFiniteError             LORA-E091   a loss or gradient became NaN or infinite
    ├─ DiskError (OSError)           LORA-E100   a file could not be written
    ├─ MissingExtra (ImportError)    LORA-E110   an optional package is not installed
    └─ NotYetSupported (NotImplementedError) LORA-E120   known, but not built yet

A message says what is wrong, where (path, tensor, field, expected, actual) and what to do. The text is for people and
may change; programs read the class and its fields: `what`, `where`, `field`, `allowed` and `override`.
This module imports nothing of lorakit.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any, ClassVar

OVERRIDE = "{override}"
"""Placeholder in an error's `advice`: stands for the way to override the check."""


class LorakitError(Exception):
    """Root of the tree; catch it to catch every error that lorakit raises on purpose.

    All fields are optional keywords of every class: a message alone is enough. They survive pickling and copying.

    Attributes:
        code: Stable name of the class of error, for programs and logs.
        exit_code: Exit status of the command line: 1 failed, 2 used wrongly.
        message: The text without `advice`.
        advice: What to do, as the end of the text; may contain `OVERRIDE`. None if `message` says it.
        what: The name or value that is wrong, such as an unknown adapter, target or setting, or a short statement; a
            value that is not a str is held as its repr, so that every error can be pickled.
        where: Path of a file or directory, dotted path of a module, or name of a tensor.
        field: The config field or setting at fault.
        allowed: What is allowed or available instead of `what`.
        override: The allowance (a word of `allow`), setting or flag that overrides the check.
    """

    code: ClassVar[str] = "LORA-E000"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str = "",
        *,
        advice: str | None = None,
        what: object = None,
        where: str | PathLike[str] | None = None,
        field: str | None = None,
        allowed: Iterable[str] = (),
        override: str | None = None,
    ) -> None:
        self.message = message
        self.advice = advice
        self.what = what if what is None or isinstance(what, str) else repr(what)
        self.where = None if where is None else str(where)
        self.field = field
        self.allowed = tuple(allowed)
        self.override = override
        super().__init__(self.text())

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields as keywords, for an error that wraps this one: `kind(f"{path}: {e}", **e.fields)`."""
        return {name: getattr(self, name) for name in ("what", "where", "field", "allowed", "override")}

    def text(self, how: str | None = None) -> str:
        """Return the message and the advice.

        Args:
            how: How the check is overridden, such as "give --allow-nonfinite"; None says it as the Python API does.
        """
        if self.advice is None:
            return self.message
        return f"{self.message} {self.advice.replace(OVERRIDE, how or f'allow {self.override!r}')}"


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


class NoTargetError(TargetError):
    """No module or table that a config names is in the model; `what` is what it names."""

    code = "LORA-E021"


class AdapterError(LorakitError, ValueError):
    """No such adapter, a name that cannot be used, or a name already in use."""

    code = "LORA-E030"


class RouteError(LorakitError, RuntimeError, ValueError):
    """Which adapter a row uses is not known, or cannot be had at this site."""

    code = "LORA-E040"


class RowCountError(RouteError):
    """A route and a batch have different numbers of rows."""

    code = "LORA-E041"


class MixedRowsError(RouteError):
    """A module cannot run rows of different adapters in one batch.

    `what` is the type of the module or its output, `field` the config field to blame: "modules_to_save", "bias", or
    None for a layer with factors.
    """

    code = "LORA-E042"


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


class ShapeMismatchError(AdapterFileError):
    """Tensors of an adapter have other shapes than the model needs."""

    code = "LORA-E063"


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
