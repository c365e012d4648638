"""Streaming detokenization: the concatenated pieces equal the text that decoding all tokens at once would give.

A token cannot always be decoded alone: it may be only part of a character, and the previous token may determine whether
its text starts with a space. So each token is decoded together with the tokens before it, and incomplete characters are
held back. This module does not depend on a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # character that decoders output for invalid or incomplete bytes
PENDING_CHARACTERS = 3  # an incomplete UTF-8 character has up to 3 bytes, each decoded to one replacement character
PENDING_TOKENS = 4  # maximum number of tokens that a character can span, one per byte
CONTEXT_TOKENS = 8  # number of prompt tokens that are decoded together with the first new token


class Tokenizer(Protocol):
    """The part of the transformers tokenizer interface that detokenization uses."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """Return the text that the token ids encode."""


class TextStream:
    """Incremental conversion of a growing list of tokens to text, with or without special tokens such as end-of-text.

    The prompt tokens `after` precede the first new token; their text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(after)[-CONTEXT_TOKENS:]
        self._settled = len(self._window)  # number of leading tokens whose text was returned in full
        self._given = self._text(self._window)  # text in the window that comes from the prompt or was already returned

    def push(self, token: int) -> str:
        """Add a token and return the text that is now final, which may be empty."""
        self._window.append(token)
        text = self._text(self._window)
        if not text.startswith(self._given) and len(self._window) - self._settled <= PENDING_TOKENS:
            return ""  # an incomplete character can change how earlier bytes are decoded
        certain = _certain(text)
        piece = text[len(self._given) : certain]
        self._given = text[: max(certain, len(self._given))]
        if certain == len(text) and piece:
            # the tokens whose text was just returned replace the older ones as context for the next token
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._given = self._text(self._window)
        return piece

    def finish(self) -> str:
        """Return the pending text; a character that was never completed becomes "\ufffd"."""
        text = self._text(self._window)
        piece = text[len(self._given) :]
        self._given = text
        return piece

    def _text(self, ids: list[int]) -> str:
        # with spaces cleaned up, a later token could change text already returned ("word ." becomes "word.")
        options = {"skip_special_tokens": self._skip, "clean_up_tokenization_spaces": False}
        return self._tokenizer.decode(ids, **options) if ids else ""


def _certain(text: str) -> int:
    """Return how many leading characters of a text cannot be changed by later bytes."""
    whole = len(text.rstrip(REPLACEMENT))
    return max(whole, len(text) - PENDING_CHARACTERS)
