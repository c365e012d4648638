"""Prompts and answers of `lorakit generate`: where prompts come from, and how answers are printed as they arrive.

One answer is printed as a stream, several in columns or one after another. This module depends on neither models nor
adapters.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli import console
from lorakit.durable import JsonObject, JsonValue, parse_json
from lorakit.errors import DataError, UsageError, printable
from lorakit.tables import (
    display_width,
    format_bytes,
    format_count,
    format_rate,
    is_animated,
    screen_width,
    wrap,
)
from lorakit.terminal import drawing_console, working, write_model_text

if TYPE_CHECKING:
    from lorakit.data import Conversation
    from lorakit.generate import NewToken
    from lorakit.session import Answer

MAX_PROMPT_BYTES = 64 << 20


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return at least one prompt: the texts, then the contents of the files, or standard input if neither is given.

    A file, "-" for standard input, has one prompt, whose final line break is removed.

    Raises:
        UsageError: There is no prompt, or a prompt is empty.
        DataError: A file is missing, too large, or not UTF-8.
    """
    prompts = [(text, "--prompt") for text in texts]
    if not texts and not files:
        if sys.stdin is not None and sys.stdin.isatty():
            console.note("Type a prompt and press Enter (several lines: --prompt-file FILE).")
            with working(None):
                prompts = [(sys.stdin.readline().removesuffix("\n"), "standard input")]
        elif sys.stdin is not None:
            files = [Path("-")]
        if not files and not any(text for text, _ in prompts):
            text = 'no prompt; pass --prompt "...", --prompt-file FILE, or pipe text to standard input.'
            raise UsageError(text, field="prompt")
    for path in files:
        where = "standard input" if str(path) == "-" else str(path)
        prompts.append((_read(path, where), where))
    for text, where in prompts:
        if not text.strip():
            raise UsageError(f"{where}: the prompt is empty.", where=where)
    return [text for text, _ in prompts]


def read_chats(files: Sequence[Path]) -> list[Conversation]:
    """Read conversations to continue, in the layouts of training data, from JSON or JSONL files.

    Each value is a list of messages, or an object with `messages`, and optionally `tools` and `chat_template_kwargs`.

    Raises:
        DataError: A file cannot be read, or a conversation is invalid or ends with the assistant's message.
    """
    values = [(value, str(path), line) for path in files for line, value in _values(path)]
    if not values:
        return []
    from lorakit.session.prompts import conversation  # imports torch

    return [conversation(*value) for value in values]


def read_tools(path: Path) -> tuple[JsonObject, ...]:
    """Read a list of functions (JSON schemas) from a JSON file.

    Raises:
        DataError: The file cannot be read, or does not contain such a list.
    """
    from lorakit.data.messages import BadRow, tools_of

    ((_, value),) = _values(path)[:1]
    try:
        tools = tools_of(value, "tools")
    except BadRow as cause:
        raise DataError(f"{path}: {cause}", where=str(path)) from None
    if not tools:
        raise DataError(f"{path}: there are no tools in the file.", where=str(path))
    return tools


def _values(path: Path) -> list[tuple[int | None, JsonValue]]:
    """Return the JSON value of a file, or of each line of a JSONL file, with the line number."""
    where = str(path)
    text = _read(path, where)
    try:
        return [(None, parse_json(text))]
    except (ValueError, RecursionError) as cause:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if len(lines) < 2 or path.suffix == ".json":
            raise DataError(f"{where}: invalid JSON ({cause}).", where=where) from None
    values: list[tuple[int | None, JsonValue]] = []
    for number, line in lines:
        try:
            values.append((number, parse_json(line)))
        except (ValueError, RecursionError) as cause:
            raise DataError(f"{where}:{number}: invalid JSON ({cause}).", where=f"{where}:{number}") from None
    return values


def summary(prompt: str | Conversation) -> str:
    """Return the text of a prompt, or of the last message of a conversation."""
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content or ""


def first_line(prompt: str) -> str:
    """Return the first line of a prompt, shortened."""
    first, *rest = prompt.strip().splitlines()
    return first[:120] + (" …" if rest or len(first) > 120 else "")


def _read(path: Path, where: str) -> str:
    """Read a file, a pipe or standard input, whose size is unknown before, as text without its final break."""
    try:
        is_input = str(path) == "-"
        what = None if is_input else f"reading {path}"
        with working(what), contextlib.nullcontext(sys.stdin) if is_input else path.open("rb") as file:
            given: str | bytes = file.read(MAX_PROMPT_BYTES + 1)
        if len(given) > MAX_PROMPT_BYTES:
            raise DataError(f"{where}: a prompt must not exceed {format_bytes(MAX_PROMPT_BYTES)}.", where=where)
        text = given if isinstance(given, str) else given.decode("utf-8")
    except OSError as cause:
        raise DataError(f"{where}: the prompt file cannot be read ({cause.strerror}).", where=where) from None
    except UnicodeDecodeError as cause:
        raise DataError(f"{where}: not UTF-8 ({cause.reason} at byte {cause.start}).", where=where) from None
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


MIN_COLUMN = 36  # characters; narrower columns are hard to read
_ENDINGS = {
    "eos": "end of text",
    "stop": "ended by --stop",
    "length": "stopped at --max-new-tokens",
    "context": "stopped at the model's context length",
    None: "interrupted",
}


def show(answers: Sequence[Answer], stream: Iterable[NewToken], *, quiet: bool = False, verbose: bool = False) -> None:
    """Append a stream of tokens to the answers, one per row, and print the answers unless `quiet` is set.

    With `verbose`, print also the token count and speed of each answer.
    """
    columns = max(1, shutil.get_terminal_size().columns // max(1, len(answers)))
    if quiet:
        _fill(answers, stream)
    elif len(answers) == 1:
        _stream_one(answers[0], stream)
    elif is_animated(sys.stdout) and columns >= MIN_COLUMN:
        _live_columns(answers, stream)
    else:
        _fill(answers, stream)
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


def _fill(answers: Sequence[Answer], stream: Iterable[NewToken]) -> None:
    for new in stream:
        answers[new.row].add(new)


def _stream_one(answer: Answer, stream: Iterable[NewToken]) -> None:
    width = screen_width(sys.stdout)
    lines = None if width is None else _Lines(width)
    try:
        for new in stream:
            piece = answer.add(new)
            write_model_text(piece if lines is None else lines.add(printable(piece)))
    finally:
        if lines is not None:
            write_model_text(lines.end())
        if not answer.text.endswith("\n"):
            write_model_text("\n")


def _live_columns(answers: Sequence[Answer], stream: Iterable[NewToken]) -> None:
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
        _fill(answers, stream)


def _sum_up(answers: Sequence[Answer], verbose: bool) -> None:
    for answer in answers:
        if answer.ended in ("eos", "stop") and not verbose:
            continue
        who = f"{answer.name}: " if len(answers) > 1 else ""
        counts = f"{format_count(answer.tokens, 'token')}, " if verbose else ""
        if verbose and answer.seconds > 0:
            counts += f"{format_rate(answer.tokens / answer.seconds, 'tokens/s')}; "
        console.note(f"[{who}{counts}{_ENDINGS[answer.ended]}]")
