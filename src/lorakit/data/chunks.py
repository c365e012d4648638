"""Tokens of a long text, a part at a time: the same tokens as of the whole text, in bounded memory.

A part is tokenized with some text after it, and the next part begins inside that text. Where the tokens of both agree
over half of what they share, the rest cannot depend on what came before, and they are joined there, at a border of
words. Where they do not agree, the part is made longer, in the end as long as the text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorakit.data.tokens import Tokenizer, token_ids

PART_CHARACTERS = 1 << 17
"""Characters of a part."""

SHARED_CHARACTERS = 1 << 12
"""Characters that two parts share."""

_LEAST_TOKENS = 16
# after a letter: a mark, or one space and a letter; a token across such a place is in no common vocabulary
_BORDER = re.compile(r"(?<=[^\W\d_])(?=[^\w\s]|\s[^\W\d_])")


@dataclass(frozen=True, slots=True)
class _Part:
    """A text with its tokens: ids, and where each begins and ends in it."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    def at(self, place: int) -> int:
        """The first token that begins at a place or after it."""
        return bisect_left(self.spans, (place, 0))


class _Source:
    """Gives a text out in portions of any size."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._held = ""
        self._more = True

    def ended(self) -> bool:
        """Return whether all has been given out."""
        return not self._more and not self._held

    def take(self, characters: int) -> str:
        """Return so many characters, fewer only at the end."""
        held = [self._held]
        have = len(self._held)
        while self._more and have <= characters:  # one more than asked for, to know whether it is the end
            piece = next(self._pieces, None)
            self._more = piece is not None
            held.append(piece or "")
            have += len(held[-1])
        whole = "".join(held)
        self._held = whole[characters:]
        return whole[:characters]


def token_parts(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Return the tokens of a text in parts; no special token is added.

    Args:
        tokenizer: The tokenizer; one without offsets takes the whole text at once.
        pieces: The text, in order.

    Returns:
        Lists of token ids; joined they are the tokens of the whole text.
    """
    source = _Source(pieces)
    text = source.take(PART_CHARACTERS)
    if source.ended() or not getattr(tokenizer, "is_fast", False):
        while not source.ended():
            text += source.take(max(len(text), PART_CHARACTERS))
        yield token_ids(tokenizer, text)
        return
    part, begin = _part(tokenizer, text), 0
    while not source.ended():
        more = source.take(max(PART_CHARACTERS, len(part.text) - PART_CHARACTERS))
        joined = _joined(tokenizer, part, more)
        if joined is None:
            part = _part(tokenizer, part.text + more)
        else:
            following, end, next_begin = joined
            yield part.ids[part.at(begin) : part.at(end)]
            part, begin = following, next_begin
    yield part.ids[part.at(begin) :]


def _joined(tokenizer: Tokenizer, part: _Part, more: str) -> tuple[_Part, int, int] | None:
    """The part that follows, and where the two are joined, in the text of each; None if they cannot be."""
    at = _border(part.text)
    if at is None:
        return None
    following = _part(tokenizer, part.text[at:] + more)
    place = _joint(part, following, at)
    return None if place is None else (following, place, place - at)


def _border(text: str) -> int | None:
    """Where the next part can begin, or None."""
    found = _BORDER.search(text, len(text) - SHARED_CHARACTERS, len(text) - SHARED_CHARACTERS * 3 // 4)
    return found.start() if found else None


def _joint(part: _Part, following: _Part, at: int) -> int | None:
    """A place in a part's text where its tokens and those of the following part can be joined, or None.

    Args:
        part: The part.
        following: The one that begins inside it.
        at: Where.
    """
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
    found = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    return _Part(text, list(found["input_ids"]), list(found["offset_mapping"]))
