"""All exceptions that lorakit raises deliberately, each with a stable code.

    LorakitError                     LORA-E000
    ├─ ConfigError (ValueError)      LORA-E010   a config field or setting has a value that is not allowed
    │  ├─ UsageError                 LORA-E011   the command line or call is not valid
    │  └─ ConfigTypeError (TypeError) LORA-E012  a config field or setting has the wrong type
    ├─ TargetError (ValueError)      LORA-E020   a target list matches nothing, or some of its entries match nothing
    │  └─ NoTargetError              LORA-E021   none of a config's targets was found in the model
    ├─ AdapterError (ValueError)     LORA-E030   an adapter name is unknown, invalid or in use
    │  └─ UnknownModelError          LORA-E032   a request names an adapter or a version that a server does not have
    ├─ RouteError (RuntimeError)     LORA-E040   a row's adapter is unknown or not available at a site
    │  ├─ RowCountError              LORA-E041   a route and a batch have different numbers of rows
    │  └─ MixedRowsError             LORA-E042   a module cannot process rows with different adapters in one batch
    ├─ MergeError (RuntimeError)     LORA-E050   a merge or unmerge is not possible
    ├─ AdapterFileError (ValueError) LORA-E060   an adapter's files are missing or damaged, or do not match the model
    │  ├─ BaseMismatchError          LORA-E061   the adapter was trained on another base
    │  ├─ PatternError               LORA-E062   a file contains a regular expression as a name pattern; it is not run
    │  └─ ShapeMismatchError         LORA-E063   an adapter's tensors do not have the shapes that the model requires
    ├─ ModelError (ValueError)       LORA-E070   a model or tokenizer cannot be found or used
    ├─ DataError (ValueError)        LORA-E080   training data cannot be read or used
    ├─ RunError (RuntimeError)       LORA-E090   a run directory or checkpoint cannot be used, or a run cannot continue
    │  ├─ NonFiniteError             LORA-E091   a loss, gradient or logit became NaN or infinite
    │  └─ BusyError                  LORA-E092   a server has too many requests or is ending
    ├─ DiskError (OSError)           LORA-E100   a file could not be written
    ├─ MissingExtra (ImportError)    LORA-E110   an optional package is not installed
    └─ NotYetSupported (NotImplementedError) LORA-E120   a known feature is not implemented

Each message says what is wrong, where (path, tensor, field, expected and actual value) and what to do about it. The
text is for users and may change; programs should use the class and its fields: `what`, `where`, `field`, `allowed` and
`override`. This module does not import any other lorakit module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

OVERRIDE = "{override}"
"""Placeholder in an error's `advice`, to be replaced with instructions for overriding the check."""


class LorakitError(Exception):
    """Base class of all exceptions that lorakit raises deliberately.

    Every class accepts all fields as optional keyword arguments; a message alone is enough. Pickling and copying
    preserve the fields.

    Attributes:
        code: Stable identifier of the exception class, for programs and logs.
        exit_code: Exit code of the command line: 1 for a failure, 2 for a usage error.
        message: The text without `advice`.
        advice: What to do about the error, appended to the message; may contain `OVERRIDE`. None if `message` already
            includes the advice.
        what: The invalid name or value, such as an unknown adapter, target or setting, or a short description of the
            problem. A value that is not a str is stored as its repr, so that every error can be pickled.
        where: Path of a file or directory, dotted path of a module, or name of a tensor.
        field: The invalid config field or setting.
        allowed: Allowed or available values.
        override: The allowance (an entry in `allow`), setting or flag that overrides the check.
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
        """Return this error's fields as keyword arguments for a new error: `kind(f"{path}: {e}", **e.fields)`."""
        return {name: getattr(self, name) for name in ("what", "where", "field", "allowed", "override")}

    def text(self, how: str | None = None) -> str:
        """Return the message and the advice; `how` replaces its "pass allow=[…]", e.g. by "pass --allow-nonfinite"."""
        if self.advice is None:
            return self.message
        return f"{self.message} {self.advice.replace(OVERRIDE, how or f'allow {self.override!r}')}"


class ConfigError(LorakitError, ValueError):
    """A config field or setting has a value that is not allowed."""

    code = "LORA-E010"
    exit_code = 2

    @classmethod
    def of(cls, field: str, value: object, rule: str = "", *, allowed: Iterable[str] = ()) -> ConfigError:
        """Return an error about an invalid value, with a message such as "r is 0; it must be an integer >= 1.".

        By default, the rule is "one of `allowed`"; the message suggests an allowed value that is spelled similarly.
        """
        names = tuple(allowed)
        message = f"{field} is {value!r}; it must be {rule or 'one of ' + ', '.join(names)}."
        return cls(message + did_you_mean(str(value), names), what=value, field=field, allowed=names)


class UsageError(ConfigError):
    """The command line or call is not valid."""

    code = "LORA-E011"


class ConfigTypeError(ConfigError, TypeError):
    """A config field or setting has the wrong type."""

    code = "LORA-E012"


class TargetError(LorakitError, ValueError):
    """A target list matches nothing, or some of its entries match nothing."""

    code = "LORA-E020"


class NoTargetError(TargetError):
    """None of a config's targets was found in the model; `what` gives the targets."""

    code = "LORA-E021"


class AdapterError(LorakitError, ValueError):
    """An adapter name is unknown, invalid or in use."""

    code = "LORA-E030"


class UnknownModelError(AdapterError):
    """A request names an adapter or a version that a server does not have."""

    code = "LORA-E032"


class RouteError(LorakitError, RuntimeError, ValueError):
    """A row's adapter is unknown or not available at this site."""

    code = "LORA-E040"


class RowCountError(RouteError):
    """A route and a batch have different numbers of rows."""

    code = "LORA-E041"


class MixedRowsError(RouteError):
    """A module cannot process rows with different adapters in one batch.

    `what` is the type of the module or of its output; `field` is the config field involved, "modules_to_save" or
    "bias", or None for a layer with LoRA factors.
    """

    code = "LORA-E042"


class MergeError(LorakitError, RuntimeError, ValueError):
    """A merge or unmerge is not possible.

    Code written for PEFT may catch either RuntimeError or ValueError, so this class is a subclass of both.
    """

    code = "LORA-E050"


class AdapterFileError(LorakitError, ValueError):
    """An adapter's files are missing or damaged, or do not match the model."""

    code = "LORA-E060"


class BaseMismatchError(AdapterFileError):
    """The adapter was trained on another base model."""

    code = "LORA-E061"


class PatternError(AdapterFileError):
    """A file contains a regular expression as a name pattern; lorakit does not run regular expressions from files."""

    code = "LORA-E062"


class ShapeMismatchError(AdapterFileError):
    """An adapter's tensors do not have the shapes that the model requires."""

    code = "LORA-E063"


class ModelError(LorakitError, ValueError):
    """A model or its tokenizer cannot be found or used."""

    code = "LORA-E070"


class DataError(LorakitError, ValueError):
    """Training or evaluation data cannot be read or used."""

    code = "LORA-E080"

    @classmethod
    def missing(cls, path: Path) -> DataError:
        """Return an error about a data file that does not exist, with a similar name."""
        hub = f" For a data set on the Hub, write hf:{path}." if not path.suffix and len(path.parts) == 2 else ""
        return cls(f"{path}: data file not found.{similar_path(path)}{hub}", where=path, field="data")


class RunError(LorakitError, RuntimeError):
    """A run directory or checkpoint cannot be used, or a run cannot continue."""

    code = "LORA-E090"


class NonFiniteError(RunError):
    """A loss, gradient or logit became NaN or infinite."""

    code = "LORA-E091"


class BusyError(RunError):
    """A server has too many requests or is ending; the request can be repeated."""

    code = "LORA-E092"


class DiskError(LorakitError, OSError):
    """A file could not be written."""

    code = "LORA-E100"


class MissingExtra(LorakitError, ImportError):
    """An optional package is not installed; the message gives the pip command."""

    code = "LORA-E110"


class NotYetSupported(LorakitError, NotImplementedError):
    """A known feature is not implemented; the message names the field."""

    code = "LORA-E120"


def require_packages(what: str, extra: str, names: Iterable[str]) -> None:
    """Raise a MissingExtra error that gives the pip command if a package is missing; nothing is imported."""
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{what} needs {' and '.join(missing)}; run pip install 'lorakit[{extra}]'", what=missing[0])


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that is attributed to the nearest caller outside lorakit."""
    import sys
    import warnings

    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "lorakit":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # symbols for control characters, including ESC
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    # characters that separate lines or paragraphs, or change the text direction
    **{code: f"\\u{code:04x}" for code in (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))},
}
_SHOWN_IN_TEXT = {code: shown for code, shown in _SHOWN.items() if chr(code) not in "\n\t"}

_SURROGATES = "\ud800-\udfff"
CONTROLS = re.compile(f"[{re.escape(''.join(map(chr, _SHOWN)))}{_SURROGATES}]")
"""Pattern of the characters that can control a terminal or reorder text, or that cannot be encoded."""


def printable(text: str, one_line: bool = False) -> str:
    """Return the text with control characters made visible: the escape character becomes "\u241b".

    Names and values from files can contain any. `one_line` makes line feeds and tabs visible too.
    """
    if CONTROLS.search(text) is None:
        return text
    encodable = text.encode("utf-8", "backslashreplace").decode()  # JSON can contain an unpaired surrogate
    return encodable.translate(_SHOWN if one_line else _SHOWN_IN_TEXT)


def describe(cause: BaseException) -> str:
    """Return the class and the message of an exception that lorakit did not raise, in one line."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split()) or 'no message'}"


def nearest(word: str, candidates: list[str], count: int = 3) -> list[str]:
    """Return up to `count` candidates that are close in spelling to a word, best match first."""
    import difflib

    return difflib.get_close_matches(word, candidates, n=count, cutoff=0.5)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return " Did you mean x?", where x is the candidate closest in spelling, or "" if none is close."""
    close = nearest(word, list(candidates), 1)
    return f" Did you mean {close[0]}?" if close else ""


def similar_path(path: Path) -> str:
    """Return a sentence about the name in the path's directory that is closest in spelling, or "" if none is close."""
    try:
        names = {other.name: str(other) for other in path.parent.iterdir()}
    except OSError:
        return f" The directory {path.parent} does not exist either."
    close = nearest(path.name, list(names), 1)
    return f" Did you mean {names[close[0]]}?" if close else ""
