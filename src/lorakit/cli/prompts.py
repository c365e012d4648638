"""Prompts of `lorakit generate`: where they come from, and how they are formatted and tokenized."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli import console
from lorakit.durable import JsonObject, JsonValue, parse_json
from lorakit.errors import DataError, UsageError
from lorakit.tables import format_bytes
from lorakit.terminal import working

if TYPE_CHECKING:
    from lorakit.data import Conversation

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
    """Read a file, a pipe or standard input, of which the size is unknown before, as text without its final break."""
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
