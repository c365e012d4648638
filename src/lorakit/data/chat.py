"""Render conversations with a chat template, and find the assistant's tokens, which contribute to the loss.

If the template marks the assistant's text with `{% generation %}`, those marks are used. Otherwise, the conversation is
rendered twice for each assistant turn: once up to the turn and once including it. The text that the second rendering
adds is the text that the model would have to generate. That text includes tool calls and reasoning. A template that
omits them is rejected, because training would otherwise ignore a part of the data.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.records import Conversation, Message, location
from lorakit.data.tokens import Tokenizer, text_of, token_ids
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import ConfigError, DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A tokenized conversation or completion.

    Attributes:
        ids: Token ids.
        trained: Whether each token contributes to the loss; True in assistant turns and in completions.
        ended: Whether an end marker contributes to the loss: the template's end-of-turn marker, or the end-of-text
            token.
        untrained_turns: Number of assistant turns excluded from the loss because they were not found in the rendered
            text.
        reason: Why the first of these turns was not found, or "".
        prompt: Text that ends the generation prompt but does not precede the answer in the conversation, or "".
    """

    ids: list[int]
    trained: list[bool]
    ended: bool
    untrained_turns: int = 0
    reason: str = ""
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    ended: bool
    prompt: str = ""


def read_template(path: Path) -> str:
    """Read a chat template from a Jinja file.

    Args:
        path: The file.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        text = f"chat_template: {path} cannot be read ({cause}); pass a Jinja file."
        raise ConfigError(text, what=str(path), field="chat_template") from None


def conversation_tokens(record: Conversation, tokenizer: Tokenizer) -> TokenizedRow:
    """Render and tokenize a conversation, and mark the tokens of the assistant's turns and their end markers.

    Args:
        record: The conversation.
        tokenizer: A tokenizer with a chat template.

    Returns:
        The tokens and their marks; the marked tokens decode to the text that the template renders for the assistant.

    Raises:
        DataError: The tokenizer has no chat template, the template rejects the conversation or omits tools, tool calls,
            content or reasoning, or the tokens of a turn do not decode to the rendered text.
    """
    template = tokenizer.chat_template
    if not template:
        raise _error(
            record,
            "the data contains conversations, but the model's tokenizer has no chat template. Use an instruct model, "
            "or rows with 'prompt' and 'completion'.",
        )
    text = _apply(record, tokenizer, record.as_dicts(), tokenize=False)
    _check_rendered(record, tokenizer, text)
    if isinstance(template, str) and _GENERATION.search(template):
        marked = _by_marks(record, tokenizer)
        if marked is not None:
            return marked
    return _by_prefixes(record, tokenizer, text)


def _by_marks(record: Conversation, tokenizer: Tokenizer) -> TokenizedRow | None:
    """Use the template's marks; return None if they do not cover the assistant's turns."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    result = _apply(record, tokenizer, record.as_dicts(), **options)
    ids, marks = list(result["input_ids"]), [bool(mark) for mark in result["assistant_masks"]]
    said = text_of(tokenizer, list(itertools.compress(ids, marks)))
    at, turns = 0, [message for message in record.messages if message.role == "assistant"]
    for turn in turns:
        content = (turn.content or "").strip()
        found = said.find(content, at)
        if found < 0 or any(str(call["name"]) not in said for call in _calls(turn)):
            return None  # the caller compares prefixes instead
        at = found + len(content)
    if not all(turn.is_trained for turn in turns):
        runs = [list(group) for mark, group in itertools.groupby(range(len(ids)), key=marks.__getitem__) if mark]
        if len(runs) != len(turns):
            return None
        for turn, run in zip(turns, runs, strict=True):
            for position in () if turn.is_trained else run:
                marks[position] = False
    return TokenizedRow(ids, marks, ended=bool(said[at:].strip()))


def _by_prefixes(record: Conversation, tokenizer: Tokenizer, text: str) -> TokenizedRow:
    spans, missed, reason = list[_Span](), 0, ""
    for index, message in enumerate(record.messages):
        if message.role != "assistant" or not message.is_trained:
            continue
        span = _span(record, tokenizer, index, text)
        if isinstance(span, str) or (spans and span.start < spans[-1].end):
            missed += 1
            reason = reason or (span if isinstance(span, str) else _REWRITTEN)
        else:
            spans.append(span)
    ids, trained = _tokens_of_spans(record, tokenizer, text, spans)
    prompt = next((span.prompt for span in spans if span.prompt), "")
    return TokenizedRow(ids, trained, any(span.ended for span in spans), missed, reason, prompt)


_REWRITTEN = "the chat template changes assistant turns when other turns follow"


def _span(record: Conversation, tokenizer: Tokenizer, index: int, text: str) -> _Span | str:
    """Return the span of an assistant turn in the rendered conversation, or why the turn cannot be located."""
    messages, turn = record.as_dicts(), record.messages[index]
    try:
        before = _apply(record, tokenizer, messages[:index], tokenize=False, add_generation_prompt=True)
        through = _apply(record, tokenizer, messages[: index + 1], tokenize=False)
        is_usual = not index or through.startswith(before)
        history = "" if is_usual else _apply(record, tokenizer, messages[:index], tokenize=False)
    except DataError:
        return "the chat template rejects the conversation without the turns that follow"
    content = (turn.content or "").strip()
    if not content and not turn.fields:
        return "the turn is empty"
    start = len(before)
    if not through.startswith(before):  # the turn may lack the text that ends the generation prompt, such as "<think>"
        start = _shared(before, through)
        start -= max((_inside(marker, through, start) for marker in tokenizer.get_added_vocab()), default=0)
        if start < len(history):
            return _REWRITTEN
    unsaid = before[start:]  # the template's generation prompt begins the answer in a way that this turn does not
    content = next((part for part in (turn.content or "", content) if part and part in through[start:]), "")
    end = through.find(content, start) + len(content) if content and not turn.fields else len(through.rstrip())
    if not text.startswith(through[:end]):
        return _REWRITTEN
    if turn.fields or not content:
        return _Span(start, end, bool(_end_marker(record, tokenizer, index)), unsaid)
    tail = through[end:].rstrip() if text.startswith(through) else _shared_marker(tokenizer, through[end:], text[end:])
    return _Span(start, end + len(tail), bool(tail), unsaid)


def _shared(one: str, other: str) -> int:
    """Return the length of the text with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _inside(marker: str, text: str, at: int) -> int:
    """Return how many characters of a special token precede a position inside it; 0 if the position is not inside."""
    sizes = range(1, min(len(marker), at + 1))
    return next((size for size in sizes if text.startswith(marker, at - size)), 0)


def _shared_marker(tokenizer: Tokenizer, one: str, other: str) -> str:
    """Return the special token with which both texts begin, or ""."""
    markers = [marker for marker in tokenizer.get_added_vocab() if one.startswith(marker) and other.startswith(marker)]
    return max(markers, key=len, default="")


def _end_marker(record: Conversation, tokenizer: Tokenizer, index: int) -> str:
    """Return the text that the template renders after an assistant turn that contains only text."""
    answer = {"role": "assistant", "content": _ANSWER}
    return (
        str(_apply(record, tokenizer, [*record.as_dicts()[:index], answer], tokenize=False))
        .rpartition(_ANSWER)[2]
        .strip()
    )


_ANSWER = "x"


def _calls(turn: Message) -> list[JsonObject]:
    """Return the functions that a turn calls, each with its name and arguments."""
    calls: list[Any] = list(turn.fields.get("tool_calls") or ())  # type: ignore[arg-type]
    return [call["function"] for call in calls]


def _check_rendered(record: Conversation, tokenizer: Tokenizer, text: str) -> None:
    """Check that a rendered conversation contains its tools and the content, calls and reasoning of assistant turns.

    A template may leave the reasoning out of earlier turns, but must render it while the turn is the last one.
    """
    tools = [tool.get("function", tool) for tool in record.tools]
    names = Counter(str(tool.get("name")) for tool in tools if isinstance(tool, dict))
    squeezed = _squeezed(text)
    if not _contains(squeezed, [*names, *(tool.get("description") for tool in tools if isinstance(tool, dict))]):
        raise _omitted("tools of the conversation", record)
    for index, turn in enumerate(record.messages):
        if turn.role != "assistant":
            continue
        names.update(str(call["name"]) for call in _calls(turn))
        arguments = [call["arguments"] for call in _calls(turn) if isinstance(call.get("arguments"), dict)]
        values = [value for given in arguments for value in given.values()]
        if any(text.count(name) < count for name, count in names.items()) or not _contains(squeezed, values):
            raise _omitted("tool calls of an assistant turn", record)
        content, reasoning = turn.content or "", [turn.fields.get(name) for name in _REASONING]
        if not _contains(squeezed, [content.rpartition("</think>")[2]]):
            raise _omitted("content of an assistant turn", record)
        if not _contains(squeezed, [content, *reasoning]):
            through = _apply(record, tokenizer, record.as_dicts()[: index + 1], tokenize=False)
            if not _contains(_squeezed(through), [content, *reasoning]):
                raise _omitted("reasoning of an assistant turn", record)


_REASONING = ("reasoning_content", "reasoning", "thinking")


def _contains(squeezed: str, parts: Iterable[JsonValue]) -> bool:
    """Return whether a text without white space contains strings, raw or in JSON; other values are ignored."""
    return all(
        any(
            _squeezed(form) in squeezed
            for form in (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
        )
        for part in parts
        if isinstance(part, str)
    )


def _squeezed(text: str) -> str:
    """Return a text without white space, because templates trim the parts that they render."""
    return "".join(text.split())


def _omitted(what: str, record: Conversation) -> DataError:
    return _error(
        record,
        f"the model's chat template does not render the {what}. Use a model or a --chat-template that does, or remove "
        f"them from the data.",
    )


def _tokens_of_spans(
    record: Conversation, tokenizer: Tokenizer, text: str, spans: list[_Span]
) -> tuple[list[int], list[bool]]:
    borders = [at for span in spans for at in (span.start, span.end)]
    for attempt in (_whole, _piecewise):
        tokens = attempt(tokenizer, text, borders)
        if tokens is not None and all(
            _faithful(tokenizer, text[span.start : span.end], [token for token, part in tokens if part == 2 * turn + 1])
            for turn, span in enumerate(spans)
        ):
            return [token for token, _ in tokens], [part % 2 == 1 for _, part in tokens]
    raise _error(
        record,
        "the tokens of the assistant's turns do not decode to the text that the chat template renders, so the tokens "
        "to train on cannot be determined. Use rows with 'prompt' and 'completion' for this model.",
    )


_Tokens = list[tuple[int, int]]
"""Pairs of a token id and the number of turn boundaries at or before the token (odd inside a turn)."""


def _whole(tokenizer: Tokenizer, text: str, borders: list[int]) -> _Tokens | None:
    """Tokenize the text as a whole; return None if a token crosses a turn boundary or offsets are unavailable."""
    try:
        result = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        return None  # slow tokenizers do not return offsets
    tokens = []
    for token, (start, end) in zip(result["input_ids"], result["offset_mapping"], strict=True):
        part = bisect_right(borders, start)
        if part < len(borders) and borders[part] < end:
            return None
        tokens.append((token, part))
    return tokens


def _piecewise(tokenizer: Tokenizer, text: str, borders: list[int]) -> _Tokens:
    """Tokenize assistant turns and the text between them separately, since generation tokenizes a prompt alone."""
    parts = [text[start:end] for start, end in itertools.pairwise([0, *borders, len(text)])]
    return [(token, number) for number, part in enumerate(parts) if part for token in token_ids(tokenizer, part)]


def _faithful(tokenizer: Tokenizer, text: str, ids: list[int]) -> bool:
    said = text_of(tokenizer, ids)
    # SentencePiece drops one leading space when decoding; some tokenizers normalize their input
    return said in (text, text.removeprefix(" ")) or said == text_of(tokenizer, token_ids(tokenizer, text))


def _apply(record: Conversation, tokenizer: Tokenizer, messages: list[JsonObject], **options: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tools=list(record.tools) or None, **record.options, **options)
    except Exception as cause:  # a template is untrusted code and may raise anything
        raise _error(record, f"the chat template rejects this conversation ({cause}).") from cause


def _error(record: Conversation, problem: str) -> DataError:
    return DataError(f"{location(record)}: {problem}", where=location(record))
