"""The only writer of text to the streams of a terminal; it makes control and bidirectional characters visible.

Names and values from files, messages of errors and the text of models can contain any character. No other module prints
or writes to `sys.stdout` and `sys.stderr`, which `tests/architecture` checks, so that no file can control a terminal.
This module does not depend on what is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TextIO

from lorakit.errors import CONTROLS, printable
from lorakit.tables import encodable, fit, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

Color = Literal["", "red", "yellow", "green"]
"""Name of a color; "" is the terminal's own."""

SILENT_SECONDS = 4.0
"""Time between two messages about something that takes long, in seconds."""

_MESSAGES = "lorakit-messages"  # name of the threads that write them

_CODES: dict[Color, str] = {"red": "\033[31m", "yellow": "\033[33m", "green": "\033[32m"}
_PLAIN = "\033[0m"


def colored(stream: TextIO) -> bool:
    """Return whether to color a stream: only if it is a terminal, NO_COLOR is unset, and TERM is not "dumb"."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_line(
    text: str, stream: TextIO | None = None, *, label: str = "", color: Color = "", wraps: bool = True
) -> None:
    """Write lines of text, adapted to the stream's encoding and, unless `wraps` is false, to the terminal's width.

    Args:
        text: One or more lines.
        stream: The stream; None means standard output.
        label: Text before the first line, such as "error:".
        color: Color of the label.
        wraps: Whether to wrap lines to the width of a terminal.
    """
    stream = sys.stdout if stream is None else stream
    line = f"{label} {printable(text)}" if label else printable(text)
    line = fit(line, stream) if wraps else encodable(line, stream.encoding or "utf-8")
    if color and colored(stream):
        line = f"{_CODES[color]}{label}{_PLAIN}{line.removeprefix(label)}"
    print(line, file=stream, flush=True)


def write_pieces(pieces: Iterable[tuple[str, Color]]) -> None:
    """Write a line of pieces of text, each in its color, to standard output.

    Args:
        pieces: Text and color of each piece.
    """
    codes = _CODES if colored(sys.stdout) else {}
    line = "".join(
        f"{codes[color]}{printable(text)}{_PLAIN}" if color in codes else printable(text) for text, color in pieces
    )
    print(encodable(line, sys.stdout.encoding or "utf-8"), flush=True)


def write_model_text(text: str) -> None:
    """Write text of a model to standard output as it is generated; a pipe gets exactly this text.

    Args:
        text: The text, without a line feed at its end.
    """
    text = printable(text) if sys.stdout.isatty() else text
    sys.stdout.write(encodable(text, sys.stdout.encoding or "utf-8"))
    sys.stdout.flush()


def json_line(value: Any) -> str:
    """Return a value as one line of JSON in which characters that could control a terminal are escaped."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def drawing_console(stream: TextIO | None = None) -> Console:
    """Return a console for drawings that are updated in place; pass only text from `printable` to it.

    Args:
        stream: The terminal; None means standard output.
    """
    from rich.console import Console

    return Console(file=sys.stdout if stream is None else stream, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def hidden_stderr() -> Iterator[None]:
    """Discard what is written to stderr within a block, such as progress bars, except for messages of `saying`."""
    with contextlib.redirect_stderr(_Messages(sys.stderr)):
        yield


class _Messages(io.TextIOBase):
    """A stream that passes on what threads of `saying` write, and discards the rest."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text) if threading.current_thread().name == _MESSAGES else len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextlib.contextmanager
def saying(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say every `SILENT_SECONDS` seconds how long a block has been running.

    Args:
        say: Function that receives the messages, in another thread.
        what: What the block does.
    """
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(SILENT_SECONDS):
            say(f"{what}: {format_seconds(round(time.monotonic() - began))}")

    thread = threading.Thread(target=tell, daemon=True, name=_MESSAGES)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
