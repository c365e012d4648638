"""Prompts of `lorakit generate`: where they come from, and how they are formatted and tokenized."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli import console
from lorakit.durable import JsonObject, JsonValue, parse_json
from lorakit.errors import DataError, UsageError
from lorakit.tables import format_bytes
from lorakit.terminal import working

if TYPE_CHECKING:
    from torch import nn

    from lorakit.data import Conversation, Tokenizer

MAX_PROMPT_BYTES = 64 << 20


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return all prompts: the texts, then the contents of the files, or standard input if neither is given.

    Args:
        texts: Prompts given as text.
        files: Files with one prompt each; "-" is standard input.

    Returns:
        At least one prompt; a file's final line break is removed.

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


def prompt_format(tokenizer: Tokenizer, facts: Sequence[Mapping[str, Any]], chat: bool | None) -> str:
    """Return how to format prompts: "chat", "instruction" or "text".

    Args:
        tokenizer: A transformers tokenizer.
        facts: Metadata of the adapters, which records how the prompts in their training data were formatted.
        chat: Whether the user asks for the chat template; None follows the training data of the adapters, or uses the
            chat template if there is one.

    Raises:
        UsageError: A chat template is requested, but there is none.
    """
    training = [one.get("training") for one in facts]
    trained = {one.get("prompt_format") if isinstance(one, Mapping) else None for one in training}
    form = next((name for name in _FORMATS if trained == {name}), None)  # files may contain anything
    if chat is None:
        usual = "chat" if tokenizer.chat_template else "text"
        if form is None or (form == "chat" and usual == "text"):
            return usual
        if form != usual:
            console.note(f"Prompts are formatted as in the adapter's training data ({_FORMATS[form]}); see --chat.")
        return form
    if chat and not tokenizer.chat_template:
        text = "--chat needs a chat template, but the model's tokenizer has none; omit --chat."
        raise UsageError(text, field="chat")
    if form is not None and (form == "chat") != chat:
        console.warning(f"the adapter was trained on prompts in another format ({_FORMATS[form]}).")
    return "chat" if chat else "instruction" if form == "instruction" else "text"


_FORMATS = {
    "chat": "with the chat template",
    "instruction": "followed by a blank line, without a chat template",
    "text": "as plain text",
}


def encode_prompts(
    prompts: Sequence[str | Conversation],
    tokenizer: Tokenizer,
    form: str,
    system: str | None,
    tools: Sequence[JsonObject] = (),
) -> list[list[int]]:
    """Return the token ids of prompts.

    Args:
        prompts: Texts, and conversations to continue.
        tokenizer: A transformers tokenizer.
        form: Result of `prompt_format`; "chat" if there are conversations or tools.
        system: System message for the texts, or None.
        tools: JSON schemas of functions; of a conversation without its own, or of a text.

    Returns:
        A list of token ids for each prompt.

    Raises:
        UsageError: The system message cannot be used, or the chat template rejects a conversation.
        DataError: The chat template omits tools or a part of a conversation.
    """
    from lorakit.data import Conversation, Message
    from lorakit.data.tokens import beginning, token_ids

    encoded = []
    for prompt in prompts:
        if isinstance(prompt, Conversation):
            chat = prompt if prompt.tools else replace(prompt, tools=tuple(tools))
        elif form == "chat":
            before = () if system is None else (Message("system", system),)
            chat = Conversation((*before, Message("user", prompt)), "--prompt", tools=tuple(tools))
        elif system is not None and form != "instruction":
            text = "--system needs a chat template, but prompts are plain text here; omit --system."
            raise UsageError(text, field="system")
        else:
            start = "" if system is None else f"{system}\n\n"
            text = f"{start}{prompt}\n\n" if form == "instruction" else prompt
            encoded.append(beginning(tokenizer) + token_ids(tokenizer, text))
            continue
        encoded.append(_chat_ids(chat, tokenizer))
    return encoded


def _chat_ids(chat: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Render a conversation with the generation prompt, as in training, and return its token ids."""
    from lorakit.data.chat_rendering import check_rendered

    options: dict[str, Any] = {"tools": list(chat.tools) or None, "add_generation_prompt": True, **chat.options}
    try:
        found = tokenizer.apply_chat_template(chat.as_dicts(), return_dict=True, **options)
        text = tokenizer.apply_chat_template(chat.as_dicts(), tokenize=False, **options)
    except Exception as cause:  # a template is untrusted code and may raise anything
        advice = "" if len(chat.messages) > 2 or chat.tools else "; try --no-chat"
        raise UsageError(f"The chat template rejects this prompt ({cause}){advice}.", field="chat") from cause
    check_rendered(chat, tokenizer, text)
    return list(found["input_ids"])


def end_ids(model: nn.Module, tokenizer: Tokenizer, form: str) -> set[int]:
    """Return the ids of the tokens that end an answer.

    These are the end-of-text tokens of the model's config, its generation config and the tokenizer, and in a chat also
    the tokens with which the chat template ends a turn, because those were trained.

    Args:
        model: A transformers model.
        tokenizer: The model's or the adapter's tokenizer.
        form: Result of `prompt_format`.
    """
    from lorakit.data.chat import end_tokens

    found: set[int] = set(end_tokens(tokenizer)) if form == "chat" else set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} if isinstance(ids, int) else set()
    return found


def read_chats(files: Sequence[Path]) -> list[Conversation]:
    """Read conversations to continue, in the layouts of training data.

    Args:
        files: JSON or JSONL files; each value is a list of messages, or an object with `messages`, and optionally
            `tools` and `chat_template_kwargs`.

    Raises:
        DataError: A file cannot be read, or a conversation is invalid or ends with the assistant's message.
    """
    return [_chat(value, path, line) for path in files for line, value in _values(path)]


def _chat(value: JsonValue, path: Path, line: int | None) -> Conversation:
    from lorakit.data import Conversation
    from lorakit.data.messages import BadRow, messages_of, tools_of
    from lorakit.data.records import location

    row = value if isinstance(value, dict) else {"messages": value}
    options = row.get("chat_template_kwargs") or {}
    chat = Conversation((), str(path), line)
    try:
        messages = messages_of(row.get("messages", row.get("conversations")), "messages", Counter())
        tools = tools_of(row.get("tools"), "tools")
        if messages[-1].role == "assistant":
            raise BadRow("the last message is the assistant's, which generate writes; remove it.")
        if not isinstance(options, dict):
            raise BadRow("the field 'chat_template_kwargs' must be an object.")
    except BadRow as cause:
        raise DataError(f"{location(chat)}: {cause}", where=location(chat)) from None
    return replace(chat, messages=messages, tools=tools, options=options)


def read_tools(path: Path) -> tuple[JsonObject, ...]:
    """Read a list of functions (JSON schemas) from a JSON file.

    Args:
        path: The file.

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
