"""Output of the command line: results, errors, warnings, tables and JSON.

Results go to stdout; errors, warnings and notes go to stderr. With `--json`, stdout holds a single JSON document; after
a failure, this document is `{"error": {"message", "code", "exit_code"}}`. Details are printed only with `--verbose`.
Color is used only on a terminal, and never if NO_COLOR is set. Names and values from files pass through `printable`, so
that no file can control the terminal. This module does not depend on models or commands.
"""

from __future__ import annotations

import json
import os
import sys
import traceback as traceback_module
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TextIO

from cyclopts import Parameter

from lorakit.errors import printable
from lorakit.tables import NARROW, columns, fit

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

JsonFlag = Annotated[bool, Parameter(negative=(), help="Print one JSON document instead of text.")]
"""The type of a command's `json` parameter."""

VerboseFlag = Annotated[bool, Parameter(negative=(), help="Print more details.")]
"""The type of a command's `verbose` parameter."""

_RED, _YELLOW, _PLAIN = "\033[31m", "\033[33m", "\033[0m"


def colored(stream: TextIO) -> bool:
    """Return whether to color a stream: only if it is a terminal, NO_COLOR is unset, and TERM is not "dumb"."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(text: str = "") -> None:
    """Print result lines to stdout, adapted to its encoding and width."""
    print(fit(printable(text), sys.stdout))


def inline(text: str) -> str:
    """Return a name or value from a file, escaped so that it can be printed within a line of text."""
    return printable(text, one_line=True)


def note(text: str) -> None:
    """Print a progress line to stderr."""
    print(fit(printable(text), sys.stderr), file=sys.stderr)


def quiet(text: str) -> None:
    """Print nothing; used in place of `note` to suppress details if `--verbose` is not given."""


def warning(text: str) -> None:
    """Print `warning: ...` to stderr."""
    _labeled("warning:", _YELLOW, text)


def error(text: str) -> None:
    """Print `error: ...` to stderr."""
    _labeled("error:", _RED, text)


def failure(message: str, exit_code: int, *, code: str | None = None, as_json: bool = False) -> int:
    """Print an error message to stderr and, with `as_json`, also to stdout as a JSON document.

    Args:
        message: The message.
        exit_code: The exit code of the process.
        code: The stable code of the error's class, such as "LORA-E060".
        as_json: Whether to print the JSON document.

    Returns:
        `exit_code`.
    """
    error(message)
    if as_json:
        emit_json({"error": {"message": message, "code": code, "exit_code": exit_code}})
    return exit_code


def traceback(exception: Exception) -> None:
    """Print an exception's traceback to stderr."""
    print(printable("".join(traceback_module.format_exception(exception))), file=sys.stderr, end="")


def emit_json(document: JsonValue) -> None:
    """Print one JSON document to stdout; NaN and infinity become null, since JSON supports neither."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=True, allow_nan=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of aligned columns under a header and a rule; numeric columns are right-aligned.

    Args:
        header: One title per column.
        rows: Rows of cells, one cell per title; control characters are escaped.

    Returns:
        The lines of the table, joined by newlines.
    """
    return columns(header, [[inline(cell) for cell in row] for row in rows], width=NARROW)


def _labeled(label: str, color: str, text: str) -> None:
    line = fit(f"{label} {printable(text)}", sys.stderr)
    if colored(sys.stderr):
        line = f"{color}{label}{_PLAIN}{line.removeprefix(label)}"
    print(line, file=sys.stderr)


def _finite(value: JsonValue) -> JsonValue:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
