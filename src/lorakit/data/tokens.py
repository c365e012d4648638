"""The tokenizer protocol, which any transformers tokenizer implements, and tokenization of texts of any length.

To limit memory use, a long text is tokenized in overlapping parts; the result is the same as if the whole text were
tokenized at once. If two parts have the same tokens in a long middle section of their overlap, the tokens that follow
no longer depend on the text before the overlap. The parts are then joined within that section, between two words. If
the tokens differ, the first part is extended, if necessary to the whole text.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias


class Tokenizer(Protocol):
    """The methods and attributes of a transformers tokenizer that data preparation uses."""

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | dict[str, str] | None

    def __call__(self, text: str, **options: bool) -> Mapping[str, Any]:
        """Return the token ids as `input_ids`, and the offsets as `offset_mapping` if requested."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """Render a conversation and return its text, or its token ids with masks."""

    def get_vocab(self) -> dict[str, int]:
        """Return a dict from each token to its id."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the text of each token as the vocabulary has it."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """Decode token ids into text."""


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize a text without adding special tokens."""
    # verbose=False suppresses the warning about texts longer than the context; such texts are split or truncated later
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode tokens into text, including special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


Span: TypeAlias = tuple[int, int]
"""Offsets of the first character of a token and of the one after its last."""

_SPACE = "\u0120"
"""The character that is a space in the tokens of byte-level tokenizers."""


def with_spaces(tokens: list[str], spans: list[Span]) -> list[Span]:
    """Return spans that include the spaces of tokens, which some byte-level tokenizers leave out (trim_offsets)."""
    edges, end = list[Span](), 0
    following = [start for start, _ in spans[1:]] + [last for _, last in spans[-1:]]
    for token, (start, last), limit in zip(tokens, spans, following, strict=True):
        before = len(token) - len(token.lstrip(_SPACE))
        after = len(token) - len(token.rstrip(_SPACE)) if before < len(token) else 0
        end_before, end = end, max(last, min(last + after, limit))
        edges.append((max(end_before, start - before) if before else start, end))
    return edges


def cut(tokenizer: Tokenizer, text: str, ids: list[int], spans: list[Span]) -> list[str]:
    """Cut a text into one piece per token; joined, the pieces are the text.

    Text between two tokens belongs to the second one, text after the last token to that token, and a character of
    several tokens to the first of them.
    """
    whole = with_spaces(tokenizer.convert_ids_to_tokens(ids), spans)
    ends = [*itertools.accumulate((end for _, end in whole[:-1]), max, initial=0), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(ends)] if ids else []


def pieces_of(tokenizer: Tokenizer, ids: list[int], texts: Iterable[str]) -> list[str]:
    """Return the text of each token of a row as it is written, or nothing if it has other tokens than the texts."""
    parts = [_part(tokenizer, text) for text in texts]
    run = [token for part in parts for token in part.ids]
    for at in range(len(ids) - len(run) + 1):
        if ids[at : at + len(run)] == run:
            before, after = ([text_of(tokenizer, [one]) for one in some] for some in (ids[:at], ids[at + len(run) :]))
            pieces = (piece for part in parts for piece in cut(tokenizer, part.text, part.ids, part.spans))
            return [*before, *pieces, *after]
    return []


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Return `[bos]` if the tokenizer puts its beginning-of-text token before every text, else an empty list."""
    ids = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


PART_CHARACTERS = 1 << 17
"""Number of characters per part."""

SHARED_CHARACTERS = 1 << 12
"""Number of characters by which two parts overlap."""

_LEAST_TOKENS = 16
# positions between a letter and punctuation, or between a letter and a space followed by a letter: in common
# vocabularies, no token crosses them
_BORDER = re.compile(r"(?<=[^\W\d_])(?=[^\w\s]|\s[^\W\d_])")


@dataclass(frozen=True, slots=True)
class _Part:
    """A text with its token ids and their (start, end) offsets."""

    text: str
    ids: list[int]
    spans: list[Span]

    def at(self, offset: int) -> int:
        """Return the index of the first token that starts at or after an offset."""
        return bisect_left(self.spans, (offset, 0))

    def between(
        self, begin: int, end: int | None = None, cutter: Tokenizer | None = None
    ) -> tuple[list[int], list[str]]:
        """Return the tokens between two offsets, and their pieces if a tokenizer is given; see `cut`."""
        run = slice(self.at(begin), None if end is None else self.at(end))
        spans = [(first - begin, last - begin) for first, last in self.spans[run]] if cutter else []
        return self.ids[run], cut(cutter, self.text[begin:end], self.ids[run], spans) if cutter else []


class _Source:
    """A reader that returns text in chunks of any requested size."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._rest = ""
        self._more = True

    def ended(self) -> bool:
        """Return whether the text is exhausted."""
        return not self._more and not self._rest

    def take(self, characters: int) -> str:
        """Return the next `characters` characters, or fewer at the end of the text."""
        chunks = [self._rest]
        have = len(self._rest)
        while self._more and have <= characters:  # reads one extra character to detect the end of the text
            piece = next(self._pieces, None)
            self._more = piece is not None
            chunks.append(piece or "")
            have += len(chunks[-1])
        whole = "".join(chunks)
        self._rest = whole[characters:]
        return whole[:characters]


def token_parts(
    tokenizer: Tokenizer, pieces: Iterable[str], *, with_text: bool = False
) -> Iterator[tuple[list[int], list[str]]]:
    """Yield the tokens of a text, given in consecutive pieces, in parts: ids, and their texts if `with_text`.

    Without offsets, which `with_text` requires, the whole text is tokenized at once. There are no special tokens.
    """
    cutter = tokenizer if with_text else None
    source = _Source(pieces)
    text = source.take(PART_CHARACTERS)
    if source.ended() or not getattr(tokenizer, "is_fast", False):
        while not source.ended():
            text += source.take(max(len(text), PART_CHARACTERS))
        yield _part(tokenizer, text).between(0, None, cutter) if with_text else (token_ids(tokenizer, text), [])
        return
    part, begin = _part(tokenizer, text), 0
    while not source.ended():
        more = source.take(max(PART_CHARACTERS, len(part.text) - PART_CHARACTERS))
        joined = _joined(tokenizer, part, more)
        if joined is None:
            part = _part(tokenizer, part.text + more)
        else:
            following, end, next_begin = joined
            yield part.between(begin, end, cutter)
            part, begin = following, next_begin
    yield part.between(begin, None, cutter)


def _joined(tokenizer: Tokenizer, part: _Part, more: str) -> tuple[_Part, int, int] | None:
    """Return the next part and the offset of the join in both parts' texts, or None if they cannot be joined."""
    size = len(part.text)
    border = _BORDER.search(part.text, size - SHARED_CHARACTERS, size - SHARED_CHARACTERS * 3 // 4)
    if border is None:
        return None
    at = border.start()
    following = _part(tokenizer, part.text[at:] + more)
    offset = _joint(part, following, at)
    return None if offset is None else (following, offset, offset - at)


def _joint(part: _Part, following: _Part, at: int) -> int | None:
    """Return an offset after `at` in the first part at which the tokens of both parts can be joined, or None."""
    low, high = len(part.text) - SHARED_CHARACTERS * 5 // 8, len(part.text) - SHARED_CHARACTERS // 8
    mine = slice(part.at(low), part.at(high))
    theirs = slice(following.at(low - at), following.at(high - at))
    moved = [(begin + at, end + at) for begin, end in following.spans[theirs]]
    agree = part.ids[mine] == following.ids[theirs] and part.spans[mine] == moved
    if not agree or len(moved) < _LEAST_TOKENS:
        return None
    begins, ends = {begin for begin, _ in moved}, {end for _, end in moved}
    for border in _BORDER.finditer(part.text, (low + high) // 2, high):
        if border.start() in begins and border.start() in ends:
            return border.start()
    return None


def _part(tokenizer: Tokenizer, text: str) -> _Part:
    encoding = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    return _Part(text, list(encoding["input_ids"]), list(encoding["offset_mapping"]))
