"""An answer that is being generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.generate import NewToken, TextStream, Tokenizer


class Answer:
    """An answer that is being generated.

    Args:
        name: Name of the model or adapter.
        tokenizer: Tokenizer that decodes the tokens.
        prompt_ids: Token ids of the prompt.

    Attributes:
        text: The text so far.
        tokens: Number of tokens so far, with the one that ends the answer.
        ended: Why the answer ended, or None; see `lorakit.generate.Ending`.
        seconds: Time since the first token was requested.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self.name = name
        self.text = ""
        self.tokens = 0
        self.ended: str | None = None
        self.seconds = 0.0
        self._stream = TextStream(tokenizer, prompt_ids)

    def add(self, new: NewToken) -> str:
        """Add a token, and return the text that it adds.

        Args:
            new: The generated token.
        """
        self.tokens += 1
        self.ended = new.ended
        piece = self._stream.push(new.token)
        if new.ended is not None:
            piece += self._stream.finish()
        self.text += piece
        return piece

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as plain JSON values."""
        return {
            "name": self.name,
            "text": self.text,
            "tokens": self.tokens,
            "ended": self.ended,
            "seconds": self.seconds,
        }
