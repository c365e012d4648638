"""Format sizes, durations, percentages, counts and tables as plain text, consistently across lorakit.

Sizes and rates use decimal units (1 MB is 10⁶ bytes). NaN and infinite values are shown as "unknown". `fit` adapts text
to a stream's encoding and, for a terminal, to its width.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import TextIO

UNKNOWN = "unknown"

NARROW = 80
"""Assumed width, in columns, of a terminal that does not report its width; tables fit within this width."""

_ROUNDING = 1e-6
_C_LOCALES = ("C", "POSIX")

_ASCII = str.maketrans(
    {"→": "->", "×": "x", "·": "-", "…": "...", "‖": "|", "Δ": "d", "²": "^2"}
    | dict.fromkeys("─–—−", "-")
    | dict.fromkeys("‘’", "'")
    | dict.fromkeys("“”", '"')
)
_NUMBER = re.compile(r"[<>~]?[+\-−]?\d")
_HANGING = re.compile(r"\s*(?:- |\S+:?\s{2,})?")
_UNITS = ("", "k", "M", "G", "T", "P")


def format_bytes(count: float) -> str:
    """Format a size in bytes in decimal units, such as "999 B", "3.2 MB", "735 MB" or "1.49 GB"."""
    if not math.isfinite(count):
        return UNKNOWN
    if abs(count) < 999.5:
        return f"{round(count)} B"
    value, prefix = _scaled(count)
    most = 1 if prefix in ("k", "M") else 2
    return f"{value:,.{min(most, _decimals(value))}f} {prefix}B"


def format_quantity(value: float, unit: str) -> str:
    """Format a quantity with three significant digits and a decimal prefix of its unit, such as "409 GFLOP/s"."""
    if not math.isfinite(value):
        return UNKNOWN
    if abs(value) < 999.5:
        return f"{value:.3g} {unit}"
    scaled, prefix = _scaled(value)
    return f"{scaled:,.{_decimals(scaled)}f} {prefix}{unit}"


def format_rate(value: float, unit: str) -> str:
    """Format a rate, such as "3,100 tokens/s" or "4.2 tokens/s"; rates below 10 have one decimal place."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.1f} {unit}" if abs(value) < 9.95 else f"{value:,.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """Format a duration, such as "40 ms", "0.4 s", "42 s", "3 min 20 s", "2 h 5 min" or "11 d 14 h"."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds < 0.0995:
        return "0 s" if seconds == 0 else f"{1000 * seconds:.0f} ms" if seconds >= 0.0005 else "<1 ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole, 60, "min", "s")
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return _two(minutes, 60, "h", "min")
    return _two(round(seconds / 3600), 24, "d", "h")


def format_percent(fraction: float, digits: int = 2) -> str:
    """Format a fraction, usually in [0, 1], as a percentage with some decimal places, such as "1.82%".

    Values close to 0 and 1 become "<0.01%" and ">99.99%", unless the difference is less than a millionth and may
    therefore be a float32 rounding error.
    """
    if not math.isfinite(fraction):
        return UNKNOWN
    smallest = 10.0**-digits
    text = f"{100 * fraction + 0.0:.{digits}f}"
    if abs(fraction) >= _ROUNDING and not float(text):
        return f"{'<' if fraction > 0 else '>-'}{smallest:.{digits}f}%"
    if 1 - fraction >= _ROUNDING and float(text) == 100:
        return f">{100 - smallest:.{digits}f}%"
    return f"{text}%"


def format_count(number: int, singular: str, plural: str | None = None) -> str:
    """Format a count with its noun, such as "1 row", "3,000 rows" or "2 entries"; by default, the plural has an "s"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_some(names: Sequence[str], shown: int = 3, separator: str = ", ") -> str:
    """Join the first names of a list, and count the others, as in "a, b, c and 2 more"."""
    return separator.join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] | None = None, width: int | None = None
) -> str:
    """Format a table with aligned columns and a rule below the header.

    Columns are left-aligned if they are in `left` or, by default, have cells that are not numbers. A left-aligned last
    column that would exceed `width` is wrapped between words.
    """
    cells = [list(column) for column in zip(header, *rows, strict=True)]
    widths = [max(map(display_width, column)) for column in cells]
    if left is None:
        left = [at for at, column in enumerate(cells) if not column[1:] or not all(map(_is_number, column[1:]))]
    last = len(header) - 1
    if width is not None and last in left:
        widths[last] = min(widths[last], max(16, width - sum(widths[:last]) - 2 * last))
    lines = [_row(header, widths, left), "  ".join("─" * each for each in widths)]
    for row in rows:
        first, *more = wrap(row[last], widths[last], hanging="").split("\n") if last in left else [row[last]]
        lines.append(_row([*row[:-1], first], widths, left))
        lines += [_row([*[""] * last, line], widths, left) for line in more]
    return "\n".join(lines)


def wrap(text: str, width: int, *, hanging: str | None = None) -> str:
    """Wrap long lines between words; a word longer than a line, such as a path, is not broken.

    Continuation lines begin with `hanging`, by default an indent that aligns with the text of a list item or of a
    `label  text` line, or two columns more.
    """
    return "\n".join(_wrapped(line, width, hanging) for line in text.split("\n"))


def display_width(text: str) -> int:
    """Return the width of a line in screen columns: 2 per wide East Asian character, 0 per combining character."""
    if text.isascii():
        return len(text)
    return sum(map(_character_width, text))


def encodable(text: str, encoding: str, *, ascii_signs: bool = False) -> str:
    """Replace characters that an encoding lacks: symbols such as "→" become "->", and other characters are escaped.

    `ascii_signs` replaces symbols even if the encoding can represent them.
    """
    if not ascii_signs:
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            ascii_signs = True
    if ascii_signs:
        text = text.translate(_ASCII)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def fit(text: str, stream: TextIO) -> str:
    """Replace characters that a stream's encoding lacks, and wrap lines to the width of its terminal."""
    text = encodable(text, getattr(stream, "encoding", None) or "utf-8", ascii_signs=in_c_locale())
    width = screen_width(stream)
    return text if width is None else wrap(text, width)


def screen_width(stream: TextIO) -> int | None:
    """Return a terminal's width in columns (`COLUMNS` if set), or None for a file or pipe, which has no limit."""
    if not stream.isatty():
        return None
    wanted = os.environ.get("COLUMNS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    try:
        return os.get_terminal_size(stream.fileno()).columns or NARROW
    except (OSError, ValueError):
        return NARROW


def is_animated(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can redraw lines and show the symbols of progress bars and boxes."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not in_c_locale()


def in_c_locale() -> bool:
    """Return whether the environment selects the C locale, in which non-ASCII characters may not be displayed."""
    if os.environ.get("PYTHONIOENCODING") or os.environ.get("PYTHONUTF8") == "1":
        return False
    language = os.environ.get("LANG", "")
    for value in (os.environ.get("LC_ALL", ""), os.environ.get("LC_CTYPE", ""), language):
        if value and not (value == "C.UTF-8" and language in _C_LOCALES):  # Python itself replaces C with C.UTF-8
            return value in _C_LOCALES
    return False


def _scaled(value: float) -> tuple[float, str]:
    """Divide a value by 1000 until it is below 999.5 or no unit is larger; return the result and its unit prefix."""
    for prefix in _UNITS[:-1]:
        if abs(value) < 999.5:
            return value, prefix
        value /= 1000
    return value, _UNITS[-1]


def _decimals(value: float) -> int:
    """Return the number of decimal places that gives three significant digits."""
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0


def _two(count: int, base: int, large: str, small: str) -> str:
    first, rest = divmod(count, base)
    return f"{first:,} {large} {rest} {small}" if rest else f"{first:,} {large}"


def _row(cells: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> str:
    padded = []
    for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (width - display_width(cell))
        padded.append(cell + space if at in left else space + cell)
    return "  ".join(padded).rstrip()


def _is_number(cell: str) -> bool:
    return cell in ("", "-", "–", UNKNOWN) or bool(_NUMBER.match(cell))


def _wrapped(line: str, width: int, hanging: str | None) -> str:
    if display_width(line) <= width:
        return line
    begin = _HANGING.match(line)
    indent = display_width(begin[0]) if begin else 0
    if hanging is None:
        hanging = " " * (indent if begin and begin[0].strip() and indent <= width // 2 else 2 + _spaces(line))
    lines, current = [], line[: _spaces(line)]
    for space, word in re.findall(r"( *)(\S+)", line.strip(" ")):
        if current.strip() and display_width(current + space + word) > width:
            lines.append(current)
            current = hanging + word
        else:
            current += space + word
    return "\n".join([*lines, current])


def _spaces(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
