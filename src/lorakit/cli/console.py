"""How the command line speaks: errors, warnings, tables, numbers and JSON.

Conventions: results go to stdout, everything about the way there (errors, warnings, notes) to stderr. With `--json`
stdout holds JSON and nothing else; a failure is then `{"error": {"message", "code", "exit_code"}}`. Colour is used on
a terminal only, and never when NO_COLOR is set. Names and values of files are printed
with `printable`, so no file can command the terminal. This file knows nothing of models or verbs.
"""

from __future__ import annotations

import json
import os
import sys
import traceback as traceback_module
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TextIO

from cyclopts import Parameter

from lorakit.errors import printable

JsonFlag = Annotated[bool, Parameter(negative=(), help="Print one JSON document instead of text.")]
"""The type of a verb's `json` parameter."""

_RED, _YELLOW, _PLAIN = "\033[31m", "\033[33m", "\033[0m"


def colored(stream: TextIO) -> bool:
    """Whether a stream takes colour: a terminal, with NO_COLOR unset and TERM other than "dumb"."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(text: str = "") -> None:
    """Print a line of a result on stdout; characters that its encoding lacks are escaped."""
    print(encodable(printable(text)))


def inline(text: str) -> str:
    """Return a name or value of a file as it is printed inside a line: line feeds and tabs are escaped too."""
    return printable(text, one_line=True)


def encodable(text: str) -> str:
    """Return text in which characters that the encoding of stdout lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def note(text: str) -> None:
    """Print a line on stderr about what is going on."""
    print(printable(text), file=sys.stderr)


def warning(text: str) -> None:
    """Print `warning: ...` on stderr."""
    _labelled("warning:", _YELLOW, text)


def error(text: str) -> None:
    """Print `error: ...` on stderr."""
    _labelled("error:", _RED, text)


def failure(message: str, exit_code: int, *, code: str | None = None, as_json: bool = False) -> int:
    """Print why a verb failed, for people on stderr and, where asked, for programs on stdout.

    Args:
        message: One or two sentences.
        exit_code: What the process will exit with.
        code: The stable code of the error's class, such as "LORA-E060".
        as_json: Whether stdout is read by a program.

    Returns:
        `exit_code`.
    """
    error(message)
    if as_json:
        emit_json({"error": {"message": message, "code": code, "exit_code": exit_code}})
    return exit_code


def traceback(exception: Exception) -> None:
    """Print an exception's traceback on stderr."""
    print(printable("".join(traceback_module.format_exception(exception))), file=sys.stderr, end="")


def emit_json(document: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one JSON document on stdout; NaN and infinity become null, since JSON has neither."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=True, allow_nan=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in aligned columns, numbers to the right, under a header and a rule.

    Args:
        header: A title per column.
        rows: Cells as text, as many per row as there are titles; they are made printable.

    Returns:
        The lines of the table, joined by newlines.
    """
    rows = [[inline(cell) for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [len(column) > 1 and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = [_aligned(header, widths, right), "  ".join("─" * width for width in widths)]
    lines += [_aligned(row, widths, right) for row in rows]
    return "\n".join(lines)


def bytes_text(count: float) -> str:
    """A number of bytes in decimal units, as in "3.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def seconds_text(seconds: float) -> str:
    """A length of time as people say it: "0.4 s", "42 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _labelled(label: str, color: str, text: str) -> None:
    if colored(sys.stderr):
        label = f"{color}{label}{_PLAIN}"
    print(f"{label} {printable(text)}", file=sys.stderr)


def _aligned(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if to_right else cell.ljust(width)
        for cell, width, to_right in zip(cells, widths, right, strict=True)
    )
    return "  ".join(aligned).rstrip()


def _is_number(cell: str) -> bool:
    return cell in ("", "-", "–") or cell.lstrip("+-−~")[:1].isdigit()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
