"""Output of the command line: results, errors, warnings, tables and JSON.

Results go to stdout; errors, warnings and notes go to stderr. With `--json`, stdout holds a single JSON document; after
a failure, this document is `{"error": {"message", "code", "exit_code"}}`. Details are printed only with `--verbose`.
`lorakit.terminal` writes all of it and makes control characters visible. This module does not depend on models or
commands.
"""

from __future__ import annotations

import json
import sys
import traceback as traceback_module
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.durable import temporary_name
from lorakit.errors import DiskError, printable
from lorakit.tables import NARROW, columns
from lorakit.terminal import json_line, write_line

if TYPE_CHECKING:
    from lorakit.durable import JsonValue
    from lorakit.session import Remark

JsonFlag = Annotated[bool, Parameter(negative=(), help="Print one JSON document instead of text.")]
"""The type of a command's `json` parameter."""

VerboseFlag = Annotated[bool, Parameter(negative=(), help="Print more details.")]
"""The type of a command's `verbose` parameter."""


def say(text: str = "") -> None:
    """Print result lines to stdout, adapted to its encoding and width."""
    write_line(text)


def inline(text: str) -> str:
    """Return a name or value from a file, escaped so that it can be printed within a line of text."""
    return printable(text, one_line=True)


def note(text: str) -> None:
    """Print a progress line to stderr."""
    write_line(text, sys.stderr)


def quiet(text: str) -> None:
    """Print nothing; used in place of `note` to suppress details if `--verbose` is not given."""


def remarks(found: Iterable[Remark]) -> None:
    """Print what the user should know about a session to stderr."""
    for remark in found:
        (warning if remark.is_warning else note)(remark.text)


def warning(text: str) -> None:
    """Print `warning: ...` to stderr."""
    write_line(text, sys.stderr, label="warning:", color="yellow")


def error(text: str) -> None:
    """Print `error: ...` to stderr."""
    write_line(text, sys.stderr, label="error:", color="red")


def failure(message: str, exit_code: int, *, code: str | None = None, as_json: bool = False) -> int:
    """Print an error message to stderr and, with `as_json`, also to stdout as a JSON document; return the exit code.

    `code` is the stable code of the error's class, such as "LORA-E060".
    """
    error(message)
    if as_json:
        emit_json({"error": {"message": message, "code": code, "exit_code": exit_code}})
    return exit_code


def traceback(exception: Exception) -> None:
    """Print an exception's traceback to stderr."""
    write_line("".join(traceback_module.format_exception(exception)).rstrip("\n"), sys.stderr, wraps=False)


def emit_json(document: JsonValue) -> None:
    """Print one JSON document to stdout; NaN and infinity become null, since JSON supports neither."""
    write_line(json.dumps(_finite(document), indent=2, ensure_ascii=True, allow_nan=False), wraps=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of a table: aligned columns under a header and a rule; numeric columns are right-aligned.

    Control characters in cells are escaped.
    """
    return columns(header, [[inline(cell) for cell in row] for row in rows], width=NARROW)


def _finite(value: JsonValue) -> JsonValue:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def row_writer(path: Path | None) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """Yield a function that writes a row to standard output, or to a new file, kept only if the block succeeds.

    Raises:
        DiskError: The file cannot be written.
    """
    if path is None:
        yield lambda row: write_line(json_line(row), wraps=False)
        return
    temporary = temporary_name(path)
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            yield lambda row: stream.write(json_line(row) + "\n")
        temporary.replace(path)
    except OSError as cause:
        raise DiskError(f"{path}: the rows cannot be written ({cause.strerror}).", where=path) from cause
    finally:
        temporary.unlink(missing_ok=True)
