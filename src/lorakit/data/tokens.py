"""The tokenizer protocol, and three helpers that use it.

Any transformers tokenizer implements it; this module does not import transformers.
"""

from __future__ import annotations

from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that data preparation uses.

    Attributes:
        eos_token_id: End-of-text token, or None.
        bos_token_id: Beginning-of-text token, or None.
        pad_token_id: Padding token, or None.
        chat_template: Jinja template, several by name, or None.
    """

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, **options: Any) -> Any:
        """Return token ids as `input_ids`, and `offset_mapping` if requested."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Return a conversation as one text, or as token ids with masks."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Return the text of token ids."""


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text, without special tokens."""
    # verbose=False: a document longer than the model's context is fine here; it is cut into windows
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of tokens, with special tokens written out."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Return the token that this tokenizer puts before every text: `[bos]`, or an empty list."""
    ids = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []
