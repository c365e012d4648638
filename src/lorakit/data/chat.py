"""Render conversations with a chat template, and find the assistant's tokens, which contribute to the loss.

If the template marks the assistant's text with `{% generation %}`, those marks are used. Otherwise, the conversation is
rendered twice for each assistant turn: once up to the turn and once including it. The text that the second rendering
adds is the text that the model would have to generate.
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
        ids: Token ids.
        trained: Whether each token contributes to the loss; True in assistant turns and in completions.
        ended: Whether an end marker contributes to the loss: the template's end-of-turn marker, or the end-of-text
            token.
        untrained_turns: Number of assistant turns excluded from the loss because they were not found in the rendered
            text.
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
    """Render and tokenize a conversation, and mark the tokens of the assistant's turns and their end markers.

    Args:
        record: The conversation.
        tokenizer: A tokenizer with a chat template.

    Returns:
        The tokens and their marks; the marked tokens decode to the text that the template renders for the assistant.

    Raises:
        DataError: The tokenizer has no chat template, the template rejects the conversation, or the tokens of a turn
            do not decode to the rendered text.
    """
    template = tokenizer.chat_template
    if not template:
        raise _error(
            record,
            "the data contains conversations, but the model's tokenizer has no chat template. Use an instruct model, "
            "or rows with 'prompt' and 'completion'.",
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
            return None  # the marks do not cover the assistant's text; the caller compares prefixes instead
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
    """Return the span of an assistant turn in the rendered conversation, or None if the turn cannot be located."""
    messages = record.as_dicts()
    try:
        before = _apply(record, tokenizer, messages[:index], tokenize=False, add_generation_prompt=True)
        through = _apply(record, tokenizer, messages[: index + 1], tokenize=False)
    except DataError:
        return None  # a template may accept a whole conversation but reject a prefix of it
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


def _apply(record: Conversation, tokenizer: Tokenizer, messages: list[dict[str, str]], **options: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as cause:  # a template is untrusted code and may raise anything
        raise _error(record, f"the chat template rejects this conversation ({cause}).") from cause


def _error(record: Conversation, problem: str) -> DataError:
    return DataError(f"{location(record)}: {problem}", where=location(record))
