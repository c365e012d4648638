"""The only writer of text to the streams of a terminal; it makes control and bidirectional characters visible.

Names and values from files, messages of errors and the text of models can contain any character. No other module prints
or writes to `sys.stdout` and `sys.stderr`, which `tests/architecture` checks, so that no file can control a terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from lorakit.errors import CONTROLS, printable
from lorakit.tables import encodable, fit, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

Color = Literal["", "red", "yellow", "green"]
"""Name of a color; "" is the terminal's own."""

SILENT_SECONDS = 4.0
"""Time without output after which `watched` writes a line, in seconds."""

_CODES: dict[Color, str] = {"red": "\033[31m", "yellow": "\033[33m", "green": "\033[32m"}
_PLAIN = "\033[0m"


def colored(stream: TextIO) -> bool:
    """Return whether to color a stream: only if it is a terminal, NO_COLOR is unset, and TERM is not "dumb"."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_line(
    text: str, stream: TextIO | None = None, *, label: str = "", color: Color = "", wraps: bool = True
) -> None:
    """Write lines of text, adapted to the encoding of a stream (standard output) and, if it `wraps`, to the terminal's
    width.

    The first line begins with the label, such as "error:", in the color.
    """
    stream = sys.stdout if stream is None else stream
    line = f"{label} {printable(text)}" if label else printable(text)
    line = fit(line, stream) if wraps else encodable(line, stream.encoding or "utf-8")
    if color and colored(stream):
        line = f"{_CODES[color]}{label}{_PLAIN}{line.removeprefix(label)}"
    print(line, file=stream, flush=True)


def write_pieces(pieces: Iterable[tuple[str, Color]]) -> None:
    """Write a line of pieces of text, each in its color, to standard output."""
    codes = _CODES if colored(sys.stdout) else {}
    line = "".join(
        f"{codes[color]}{printable(text)}{_PLAIN}" if color in codes else printable(text) for text, color in pieces
    )
    print(encodable(line, sys.stdout.encoding or "utf-8"), flush=True)  # noqa: T201  the one writer


def write_model_text(text: str) -> None:
    """Write generated text, without its last line feed, to standard output; a pipe gets exactly this text."""
    text = printable(text) if sys.stdout.isatty() else text
    sys.stdout.write(encodable(text, sys.stdout.encoding or "utf-8"))
    sys.stdout.flush()


def json_line(value: Any) -> str:
    """Return a value as one line of JSON in which characters that could control a terminal are escaped."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def drawing_console(stream: TextIO | None = None) -> Console:
    """Return a console for drawings that are updated in place; pass only text from `printable` to it."""
    from rich.console import Console

    return Console(file=sys.stdout if stream is None else stream, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def hidden_stderr() -> Iterator[None]:
    """Discard what is written to stderr within a block, such as progress bars, except for messages of `watched`."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def watched(command: str, seconds: float = SILENT_SECONDS, silent: float = 0.0) -> Iterator[None]:
    """Write a line to stderr, if it is a terminal, whenever a block has written nothing for some seconds.

    The line says what is being done, by the innermost block of `working`, and for how long; outside of these blocks,
    for how long nothing else was written, by the command. There is no line after an unfinished one, such as a progress
    bar. `silent` is the time without output before the block, in seconds.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    watcher = _Watcher(command, seconds, silent)
    thread = threading.Thread(target=watcher.watch, daemon=True)
    token = _WATCHER.set(watcher)
    try:
        heard_stderr, heard_stdout = watcher.heard(sys.stderr), watcher.heard(sys.stdout)
        with contextlib.redirect_stderr(heard_stderr), contextlib.redirect_stdout(heard_stdout):
            thread.start()
            yield
    finally:
        watcher.ended.set()
        thread.join()  # a thread that writes while the interpreter ends can abort the process
        _WATCHER.reset(token)


@contextlib.contextmanager
def working(what: str | None) -> Iterator[None]:
    """Name what a block does, for `watched`; None if it waits for the user, or another process writes."""
    watcher = _WATCHER.get()
    if watcher is None:
        yield
        return
    watcher.blocks.append((what, time.monotonic()))
    try:
        yield
    finally:
        watcher.blocks.pop()


class _Watcher:
    """Writes a line to stderr after each silence."""

    def __init__(self, command: str, seconds: float, silent: float) -> None:
        self.ended, self._stream, self._seconds = threading.Event(), sys.stderr, seconds
        self._thread, self._is_line_open = threading.get_ident(), False
        self._heard = self._told = time.monotonic() - silent  # the last texts of others, and of this watcher
        self.blocks: list[tuple[str | None, float]] = [(command, self._heard)]

    def heard(self, stream: TextIO) -> TextIO:
        """Return a stream that writes to another one and tells this watcher; None, as of a closed stream, stays."""
        return stream and cast("TextIO", _Heard(stream, self._hear))

    def _hear(self, text: str) -> None:
        self._heard = time.monotonic()
        if shown := _SEQUENCES.sub("", text):
            self._is_line_open = shown[-1] not in "\r\n"

    def watch(self) -> None:
        """Write lines until the block of `watched` ends."""
        while not self.ended.wait(self._seconds / 8):
            (what, began), now = self.blocks[-1], time.monotonic()
            if what is None:
                self._heard = now
            elif now - max(self._heard, self._told) >= self._seconds and not self._is_line_open:
                if len(self.blocks) == 1:
                    what, began = "loading libraries" if self._is_importing() else what, self._heard
                write_line(f"{what}: {format_seconds(round(now - began))}", self._stream)
                self._told = now

    def _is_importing(self) -> bool:
        """Return whether the observed thread imports a module."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
            frame = frame.f_back
        return frame is not None


class _Heard:
    """A stream that also passes what is written to it to a function."""

    def __init__(self, stream: TextIO, hear: Callable[[str], None]) -> None:
        self._stream, self._hear = stream, hear

    def write(self, text: str) -> int:
        self._hear(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_WATCHER: ContextVar[_Watcher | None] = ContextVar("lorakit_watcher", default=None)
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[A-Za-z]")
"""Pattern of the control sequences of a terminal, which move the cursor or set colors."""
