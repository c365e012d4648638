"""Text out of tokens as they come, in pieces that add up to what decoding all of them at once would give.

A token is not a text: it can hold half a character, and its beginning can depend on the token before it (a leading
space, "##ing"). So each token is decoded beside the ones before it, and characters that are not whole yet wait.
Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or none yet
PENDING_CHARACTERS = 3  # a UTF-8 character lacks at most its last byte of four, each shown as one replacement
PENDING_TOKENS = 4  # so many tokens make a character that comes byte by byte
CONTEXT_TOKENS = 8  # tokens of the prompt that the first new one is decoded beside


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that text out of tokens needs."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """The text of token ids."""


class TextStream:
    """Text of a growing list of tokens.

    Args:
        tokenizer: Decodes token ids.
        after: Tokens that stand before the first new one (the prompt); their text does not come out.
        skip_special_tokens: Leave special tokens such as the end of text out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(after)[-CONTEXT_TOKENS:]
        self._settled = len(self._window)  # tokens of the window whose text has come out whole
        self._given = self._text(self._window)  # text of the window that has come out, or belongs to the prompt

    def push(self, token: int) -> str:
        """Take one more token.

        Args:
            token: Its id.

        Returns:
            The text that is certain by now and has not come out yet; often a word, sometimes nothing.
        """
        self._window.append(token)
        text = self._text(self._window)
        if not text.startswith(self._given) and len(self._window) - self._settled <= PENDING_TOKENS:
            return ""  # a byte that awaits others can spoil the bytes before it, which were out already
        certain = _certain(text)
        piece = text[len(self._given) : certain]
        self._given = text[: max(certain, len(self._given))]
        if certain == len(text) and piece:
            # what was settled before was needed to decode this token; from now on these tokens serve the next one
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._given = self._text(self._window)
        return piece

    def finish(self) -> str:
        """The text that was still waiting: a character that never became whole comes out as "\ufffd"."""
        text = self._text(self._window)
        piece = text[len(self._given) :]
        self._given = text
        return piece

    def _text(self, ids: list[int]) -> str:
        # with clean-up a later token would change text that is out already ("word ." becomes "word.")
        options = {"skip_special_tokens": self._skip, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options)) if ids else ""


def _certain(text: str) -> int:
    """How many characters of a text later bytes cannot change."""
    whole = len(text.rstrip(REPLACEMENT))
    return max(whole, len(text) - PENDING_CHARACTERS)
