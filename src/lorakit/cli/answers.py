"""Answers on the screen while they come: one as a plain stream, several in columns or one below the other.

Knows tokens and text, nothing of models or adapters.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli import console
from lorakit.errors import printable

if TYPE_CHECKING:
    from lorakit.generate import NewToken

MIN_COLUMN = 36  # characters below which a column is no pleasure to read
_ENDINGS = {
    "eos": "ended by itself",
    "length": "cut off at --max-new-tokens",
    "context": "cut off where the model's context is full",
    None: "interrupted",
}


class Answer:
    """One answer as it grows.

    Args:
        label: Who answers.
        tokenizer: Turns tokens into text.
        prompt_ids: Tokens it continues.
    """

    def __init__(self, label: str, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        from lorakit.generate import TextStream

        self.label = label
        self.text = ""
        self.tokens = 0
        self.ended: str | None = None
        self.seconds = 0.0
        self._stream = TextStream(tokenizer, prompt_ids)

    def add(self, new: NewToken) -> str:
        """Take a token.

        Args:
            new: The token.

        Returns:
            The text that it adds.
        """
        self.tokens += 1
        self.ended = new.ended
        piece = self._stream.push(new.token)
        if new.ended is not None:
            piece += self._stream.finish()
        self.text += piece
        return piece

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain JSON values."""
        return {
            "name": self.label,
            "text": self.text,
            "tokens": self.tokens,
            "ended": self.ended,
            "seconds": self.seconds,
        }


def show(answers: Sequence[Answer], stream: Iterable[NewToken], *, quiet: bool = False) -> None:
    """Let answers grow from a stream of tokens, on the screen unless `quiet`.

    Args:
        answers: One per row of the stream.
        stream: The tokens.
        quiet: Print nothing.
    """
    started = time.perf_counter()
    columns = max(1, shutil.get_terminal_size().columns // max(1, len(answers)))
    if quiet:
        _fill(answers, stream, started)
    elif len(answers) == 1:
        _stream_one(answers[0], stream, started)
    elif sys.stdout.isatty() and columns >= MIN_COLUMN:
        _live_columns(answers, stream, started)
    else:
        _fill(answers, stream, started)
        for number, answer in enumerate(answers):
            console.say(("\n" if number else "") + f"── {answer.label} " + "─" * max(4, 60 - len(answer.label)))
            console.say(answer.text.strip("\n"))
    if not quiet:
        _sum_up(answers)


def _fill(answers: Sequence[Answer], stream: Iterable[NewToken], started: float) -> None:
    for new in stream:
        answers[new.row].add(new)
        answers[new.row].seconds = time.perf_counter() - started


def _stream_one(answer: Answer, stream: Iterable[NewToken], started: float) -> None:
    try:
        for new in stream:
            piece = _printable(answer.add(new))
            answer.seconds = time.perf_counter() - started
            sys.stdout.write(console.encodable(piece))
            sys.stdout.flush()
    finally:
        if not answer.text.endswith("\n"):
            sys.stdout.write("\n")


def _live_columns(answers: Sequence[Answer], stream: Iterable[NewToken], started: float) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table() -> Table:
        drawn = Table(expand=True, show_lines=False)
        for answer in answers:
            drawn.add_column(Text(console.inline(answer.label)), ratio=1, overflow="fold")
        drawn.add_row(*(Text(printable(answer.text.strip("\n"))) for answer in answers))
        return drawn

    with Live(get_renderable=table, refresh_per_second=8):
        _fill(answers, stream, started)


def _sum_up(answers: Sequence[Answer]) -> None:
    for answer in answers:
        who = f"{answer.label}: " if len(answers) > 1 else ""
        speed = f", {answer.tokens / answer.seconds:.1f} tokens/s" if answer.seconds > 0 else ""
        console.note(f"[{who}{answer.tokens} tokens{speed}; {_ENDINGS[answer.ended]}]")


def _printable(text: str) -> str:
    """Return what a model wrote as a terminal may show it; a file or pipe gets the text itself."""
    return printable(text) if sys.stdout.isatty() else text
