"""Conversations through the chat template, and which of their tokens the assistant said.

Where the template marks the assistant's words (`{% generation %}`), its marks are taken. Elsewhere the rendering up
to a turn is compared with the rendering through it: what came in between is what the model would have to write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lorakit.data.records import Conversation, place
from lorakit.data.tokens import Tokenizer, text_of, token_ids
from lorakit.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation as tokens.

    Attributes:
        ids: All tokens of the conversation.
        trained: One truth value a token: whether the assistant said it.
        untrained_turns: Turns of the assistant that could not be told apart in the whole.
        ended: Whether an end after a turn is trained too.
    """

    ids: list[int]
    trained: list[bool]
    untrained_turns: int
    ended: bool


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    ended: bool


def conversation_tokens(record: Conversation, tokenizer: Tokenizer) -> Turns:
    """Render a conversation and mark what the assistant said, each turn with what ends it.

    Args:
        record: The conversation.
        tokenizer: A tokenizer with a chat template.

    Returns:
        Tokens and marks; the text of the marked tokens is what the template wrote for the assistant.

    Raises:
        DataError: There is no template, it refuses this conversation, or the tokens do not give the text back.
    """
    template = tokenizer.chat_template
    if not template:
        raise DataError(
            f"{place(record)}: the data holds conversations, but the model's tokenizer has no chat template. "
            "Take an instruct model, or rows with 'prompt' and 'completion'.",
            where=place(record),
        )
    if isinstance(template, str) and _GENERATION.search(template):
        marked = _by_marks(record, tokenizer)
        if marked is not None:
            return marked
    return _by_prefixes(record, tokenizer)


def _by_marks(record: Conversation, tokenizer: Tokenizer) -> Turns | None:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    result = _apply(record, tokenizer, record.as_dicts(), **options)
    ids, trained = list(result["input_ids"]), [bool(mark) for mark in result["assistant_masks"]]
    said = text_of(tokenizer, [token for token, mark in zip(ids, trained, strict=True) if mark])
    at, contents = 0, [m.content.strip() for m in record.messages if m.role == "assistant"]
    for content in contents:
        at = said.find(content, at)
        if at < 0:
            return None  # the marks do not cover what was said; the prefixes decide
        at += len(content)
    return Turns(ids, trained, 0, ended=bool(said[at:].strip()))


def _by_prefixes(record: Conversation, tokenizer: Tokenizer) -> Turns:
    text = _apply(record, tokenizer, record.as_dicts(), tokenize=False)
    spans, missed = [], 0
    for index, message in enumerate(record.messages):
        if message.role != "assistant":
            continue
        span = _span(record, tokenizer, index, text)
        if span is None:
            missed += 1
        else:
            spans.append(span)
    ids, trained = _tokens_of_spans(record, tokenizer, text, spans)
    return Turns(ids, trained, missed, ended=any(span.ended for span in spans))


def _span(record: Conversation, tokenizer: Tokenizer, index: int, text: str) -> _Span | None:
    """Where one turn of the assistant stands in the whole text; None where the template rewrote it."""
    messages = record.as_dicts()
    try:
        before = _apply(record, tokenizer, messages[:index], tokenize=False, add_generation_prompt=True)
        through = _apply(record, tokenizer, messages[: index + 1], tokenize=False)
    except DataError:
        return None  # a template may refuse a part of what it takes as a whole
    content = messages[index]["content"]
    if not content.strip() or not through.startswith(before):
        return None
    lead = through.find(content, len(before))
    if lead < 0:
        content = content.strip()
        lead = through.find(content, len(before))
    end = lead + len(content)
    if lead < 0 or not text.startswith(through[:end]):
        return None
    tail = through[end:].rstrip() if text.startswith(through) else ""
    return _Span(len(before), end + len(tail), ended=bool(tail))


def _tokens_of_spans(
    record: Conversation, tokenizer: Tokenizer, text: str, spans: list[_Span]
) -> tuple[list[int], list[bool]]:
    for attempt in (_whole, _piecewise):
        found = attempt(tokenizer, text, spans)
        if found is not None and all(_faithful(tokenizer, text[s.start : s.end], ids) for s, ids in found[2]):
            return found[0], found[1]
    raise DataError(
        f"{place(record)}: the tokens of the assistant's turns do not give back the text of the chat template, so "
        "what would be trained is not known. Use rows with 'prompt' and 'completion' for this model.",
        where=place(record),
    )


_Found = tuple[list[int], list[bool], list[tuple[_Span, list[int]]]]


def _whole(tokenizer: Tokenizer, text: str, spans: list[_Span]) -> _Found | None:
    """Tokens of the text as a whole, as the model will see it; None where a token lies across a border."""
    try:
        result = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        return None  # a tokenizer written in Python knows no offsets
    ids, offsets = list(result["input_ids"]), list(result["offset_mapping"])
    trained = [False] * len(ids)
    found = []
    for span in spans:
        members = []
        for index, (start, end) in enumerate(offsets):
            if start < span.start < end or start < span.end < end:
                return None
            if start >= span.start and end <= span.end and (end > start or start < span.end):
                members.append(index)
                trained[index] = True
        found.append((span, [ids[index] for index in members]))
    return ids, trained, found


def _piecewise(tokenizer: Tokenizer, text: str, spans: list[_Span]) -> _Found:
    """Tokens of the parts before, in and after each turn, each part by itself, as generation makes them."""
    ids: list[int] = []
    trained: list[bool] = []
    found = []
    at = 0
    for span in spans:
        for piece, mark in ((text[at : span.start], False), (text[span.start : span.end], True)):
            part = token_ids(tokenizer, piece) if piece else []
            ids += part
            trained += [mark] * len(part)
        found.append((span, part))
        at = span.end
    rest = token_ids(tokenizer, text[at:]) if text[at:] else []
    return ids + rest, trained + [False] * len(rest), found


def _faithful(tokenizer: Tokenizer, text: str, ids: list[int]) -> bool:
    said = text_of(tokenizer, ids)
    # SentencePiece drops one leading space in decoding; some tokenizers normalise what they read
    return said in (text, text.removeprefix(" ")) or said == text_of(tokenizer, token_ids(tokenizer, text))


def _apply(record: Conversation, tokenizer: Tokenizer, messages: list[dict[str, str]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as cause:  # a template is a program from elsewhere and may raise anything
        raise DataError(
            f"{place(record)}: the chat template refuses this conversation ({cause}).", where=place(record)
        ) from cause
