"""Render conversations with the chat template and mark the assistant's tokens.

The template's own marks (`{% generation %}`) are used if present. Otherwise the rendering up to a turn is compared with
the rendering through it: the difference is what the model would have to generate.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from lorakit.data.records import Conversation, location
from lorakit.data.tokens import Tokenizer, text_of, token_ids
from lorakit.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A tokenized conversation or completion.

    Attributes:
        ids: All tokens.
        trained: One bool per token: whether it has loss, as the assistant or the completion wrote it.
        ended: Whether the end of a turn or text also has loss.
        untrained_turns: Assistant turns that could not be located in the rendered text.
    """

    ids: list[int]
    trained: list[bool]
    ended: bool
    untrained_turns: int = 0


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    ended: bool


def conversation_tokens(record: Conversation, tokenizer: Tokenizer) -> TokenizedRow:
    """Render a conversation and mark the assistant's tokens, each turn with its end marker.

    Args:
        record: The conversation.
        tokenizer: A tokenizer with a chat template.

    Returns:
        Tokens and marks; the marked tokens are what the template wrote for the assistant.

    Raises:
        DataError: There is no template, it rejects the conversation, or the tokens do not decode to the text.
    """
    template = tokenizer.chat_template
    if not template:
        raise _error(
            record,
            "the data contains conversations, but the model's tokenizer has no template. Use an instruct model, or "
            "rows with 'prompt' and 'completion'.",
        )
    if isinstance(template, str) and _GENERATION.search(template):
        marked = _by_marks(record, tokenizer)
        if marked is not None:
            return marked
    return _by_prefixes(record, tokenizer)


def _by_marks(record: Conversation, tokenizer: Tokenizer) -> TokenizedRow | None:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    result = _apply(record, tokenizer, record.as_dicts(), **options)
    ids, trained = list(result["input_ids"]), [bool(mark) for mark in result["assistant_masks"]]
    said = text_of(tokenizer, [token for token, mark in zip(ids, trained, strict=True) if mark])
    at, contents = 0, [m.content.strip() for m in record.messages if m.role == "assistant"]
    for content in contents:
        at = said.find(content, at)
        if at < 0:
            return None  # the marks do not cover the assistant's text; compare prefixes instead
        at += len(content)
    return TokenizedRow(ids, trained, ended=bool(said[at:].strip()))


def _by_prefixes(record: Conversation, tokenizer: Tokenizer) -> TokenizedRow:
    text = _apply(record, tokenizer, record.as_dicts(), tokenize=False)
    spans, missed = list[_Span](), 0
    for index, message in enumerate(record.messages):
        if message.role != "assistant":
            continue
        span = _span(record, tokenizer, index, text)
        if span is None or (spans and span.start < spans[-1].end):
            missed += 1
        else:
            spans.append(span)
    ids, trained = _tokens_of_spans(record, tokenizer, text, spans)
    return TokenizedRow(ids, trained, any(span.ended for span in spans), missed)


def _span(record: Conversation, tokenizer: Tokenizer, index: int, text: str) -> _Span | None:
    """Return the span of an assistant turn in the whole text, or None if the template rewrote it."""
    messages = record.as_dicts()
    try:
        before = _apply(record, tokenizer, messages[:index], tokenize=False, add_generation_prompt=True)
        through = _apply(record, tokenizer, messages[: index + 1], tokenize=False)
    except DataError:
        return None  # a template may reject a prefix of a conversation that it accepts
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
        "the tokens of the assistant's turns do not decode to the text of the chat template, so the tokens with loss "
        "are unknown. Use rows with 'prompt' and 'completion' for this model.",
    )


_Tokens = list[tuple[int, int]]
"""Tokens, each with the number of borders before it, which is odd inside a turn."""


def _whole(tokenizer: Tokenizer, text: str, borders: list[int]) -> _Tokens | None:
    """Tokenize the whole text, as the model will see it; return None if a token crosses a border of a turn."""
    try:
        result = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        return None  # a slow tokenizer has no offsets
    tokens = []
    for token, (start, end) in zip(result["input_ids"], result["offset_mapping"], strict=True):
        part = bisect_right(borders, start)
        if part < len(borders) and borders[part] < end:
            return None
        tokens.append((token, part))
    return tokens


def _piecewise(tokenizer: Tokenizer, text: str, borders: list[int]) -> _Tokens:
    """Tokenize the parts before, in and after each turn separately, as generation does."""
    parts = [text[start:end] for start, end in itertools.pairwise([0, *borders, len(text)])]
    return [(token, number) for number, part in enumerate(parts) if part for token in token_ids(tokenizer, part)]


def _faithful(tokenizer: Tokenizer, text: str, ids: list[int]) -> bool:
    said = text_of(tokenizer, ids)
    # SentencePiece drops one leading space in decoding; some tokenizers normalize their input
    return said in (text, text.removeprefix(" ")) or said == text_of(tokenizer, token_ids(tokenizer, text))


def _apply(record: Conversation, tokenizer: Tokenizer, messages: list[dict[str, str]], **options: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as cause:  # a template is untrusted code and may raise anything
        raise _error(record, f"the chat template rejects this conversation ({cause}).") from cause


def _error(record: Conversation, problem: str) -> DataError:
    return DataError(f"{location(record)}: {problem}", where=location(record))
