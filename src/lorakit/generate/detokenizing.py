"""Streaming detokenization, in pieces that add up to decoding all tokens at once.

A token is not always a text: it can be half a character, and its start can depend on the token before it (a leading
space, "##ing"). So each token is decoded together with the tokens before it, and incomplete characters wait. This
module does not depend on a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # decoders output it for invalid or incomplete bytes
PENDING_CHARACTERS = 3  # an incomplete UTF-8 character has at most three of four bytes, one replacement each
PENDING_TOKENS = 4  # a character can take this many tokens, one per byte
CONTEXT_TOKENS = 8  # tokens of the prompt with which the first new one is decoded


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that detokenization uses."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """Return the text of token ids."""


class TextStream:
    """Text of a growing list of tokens.

    Args:
        tokenizer: Decoder of token ids.
        after: Tokens before the first new one (the prompt); their text is not output.
        skip_special_tokens: Whether to omit special tokens such as the end of text.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(after)[-CONTEXT_TOKENS:]
        self._settled = len(self._window)  # number of tokens in the window whose text was output in full
        self._given = self._text(self._window)  # text of the window that was output, or belongs to the prompt

    def push(self, token: int) -> str:
        """Add a token.

        Args:
            token: Its id.

        Returns:
            The text that is final by now and was not output yet; sometimes empty.
        """
        self._window.append(token)
        text = self._text(self._window)
        if not text.startswith(self._given) and len(self._window) - self._settled <= PENDING_TOKENS:
            return ""  # an incomplete byte can change the decoding of earlier bytes, which were output already
        certain = _certain(text)
        piece = text[len(self._given) : certain]
        self._given = text[: max(certain, len(self._given))]
        if certain == len(text) and piece:
            # the settled tokens were needed to decode this one; from now on these tokens serve the next one
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
        # with clean-up a later token would change text that was output already ("word ." becomes "word.")
        options = {"skip_special_tokens": self._skip, "clean_up_tokenization_spaces": False}
        return self._tokenizer.decode(ids, **options) if ids else ""


def _certain(text: str) -> int:
    """Return the number of characters of a text that later bytes cannot change."""
    whole = len(text.rstrip(REPLACEMENT))
    return max(whole, len(text) - PENDING_CHARACTERS)
