"""Print answers as they are generated: a single answer as a stream, several answers in columns or one after another.

This module handles tokens and text; it does not depend on models or adapters.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lorakit.cli import console
from lorakit.errors import printable
from lorakit.tables import display_width, format_count, format_rate, is_animated, screen_width, wrap
from lorakit.terminal import drawing_console, write_model_text

if TYPE_CHECKING:
    from lorakit.generate import NewToken
    from lorakit.session import Answer

MIN_COLUMN = 36  # characters; narrower columns are hard to read
_ENDINGS = {
    "eos": "end of text",
    "length": "stopped at --max-new-tokens",
    "context": "stopped at the model's context length",
    None: "interrupted",
}


def show(answers: Sequence[Answer], stream: Iterable[NewToken], *, quiet: bool = False, verbose: bool = False) -> None:
    """Append a stream of tokens to the answers, one per row, and print the answers unless `quiet` is set.

    With `verbose`, print also the token count and speed of each answer.
    """
    started = time.perf_counter()
    columns = max(1, shutil.get_terminal_size().columns // max(1, len(answers)))
    if quiet:
        _fill(answers, stream, started)
    elif len(answers) == 1:
        _stream_one(answers[0], stream, started)
    elif is_animated(sys.stdout) and columns >= MIN_COLUMN:
        _live_columns(answers, stream, started)
    else:
        _fill(answers, stream, started)
        for number, answer in enumerate(answers):
            console.say(("\n" if number else "") + f"── {answer.name} " + "─" * max(4, 60 - len(answer.name)))
            _print_text(answer.text.strip("\n"))
    if not quiet:
        _sum_up(answers, verbose)


class _Lines:
    """Word wrapper for text that arrives in pieces, for a terminal of `width` columns."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._space = self._word = ""

    def add(self, piece: str) -> str:
        """Add a piece of text, and return what can be printed: all but the last word, which may be incomplete."""
        out = ""
        for character in piece:
            if character == "\n":
                out += self.end() + "\n"
                self._column, self._space = 0, ""
            elif character == " ":
                out += self.end()
                self._space += " "
            else:
                self._word += character
                is_hangul = "\uac00" <= character <= "\ud7a3"
                if display_width(self._word) >= self._width or (display_width(character) > 1 and not is_hangul):
                    out += self.end()  # for example, Chinese has no spaces, so lines may break anywhere
        return out

    def end(self) -> str:
        """Return the last word, on a new line if it does not fit on the current line."""
        if not self._word:
            return ""
        out, taken = self._space + self._word, display_width(self._space + self._word)
        if self._space and self._column and self._column + taken > self._width:
            out, taken, self._column = "\n" + self._word, display_width(self._word), 0
        self._column += taken
        while self._column > self._width:  # the terminal has wrapped a long word
            self._column -= self._width
        self._space = self._word = ""
        return out


def _print_text(text: str) -> None:
    width = screen_width(sys.stdout)
    write_model_text((text if width is None else wrap(printable(text), width, hanging="")) + "\n")


def _fill(answers: Sequence[Answer], stream: Iterable[NewToken], started: float) -> None:
    for new in stream:
        answers[new.row].add(new)
        answers[new.row].seconds = time.perf_counter() - started


def _stream_one(answer: Answer, stream: Iterable[NewToken], started: float) -> None:
    width = screen_width(sys.stdout)
    lines = None if width is None else _Lines(width)
    try:
        for new in stream:
            piece = answer.add(new)
            answer.seconds = time.perf_counter() - started
            write_model_text(piece if lines is None else lines.add(printable(piece)))
    finally:
        if lines is not None:
            write_model_text(lines.end())
        if not answer.text.endswith("\n"):
            write_model_text("\n")


def _live_columns(answers: Sequence[Answer], stream: Iterable[NewToken], started: float) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table() -> Table:
        drawn = Table(expand=True, show_lines=False)
        for answer in answers:
            drawn.add_column(Text(console.inline(answer.name)), ratio=1, overflow="fold")
        drawn.add_row(*(Text(printable(answer.text.strip("\n"))) for answer in answers))
        return drawn

    with Live(get_renderable=table, console=drawing_console(), refresh_per_second=8):
        _fill(answers, stream, started)


def _sum_up(answers: Sequence[Answer], verbose: bool) -> None:
    for answer in answers:
        if answer.ended == "eos" and not verbose:
            continue
        who = f"{answer.name}: " if len(answers) > 1 else ""
        counts = f"{format_count(answer.tokens, 'token')}, " if verbose else ""
        if verbose and answer.seconds > 0:
            counts += f"{format_rate(answer.tokens / answer.seconds, 'tokens/s')}; "
        console.note(f"[{who}{counts}{_ENDINGS[answer.ended]}]")
