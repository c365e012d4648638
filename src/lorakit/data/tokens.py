"""What is asked of a tokenizer, and the three questions that are put to it.

Any transformers tokenizer answers; nothing here imports transformers.
"""

from __future__ import annotations

from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the data needs.

    Attributes:
        eos_token_id: The end-of-text token, or None.
        bos_token_id: The token that begins a text, or None.
        pad_token_id: The token that fills a batch up, or None.
        chat_template: Jinja text, several by name, or None.
    """

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, **options: Any) -> Any:
        """Token ids under `input_ids`, and `offset_mapping` where asked for."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """A conversation as one text, or as token ids with masks."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """The text of token ids."""


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text alone: no special token is added."""
    # verbose=False: a document longer than the model is no mistake here, it is cut into windows
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens, special ones spelled out."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The token that this tokenizer puts before every text: `[bos]`, or nothing."""
    ids = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []
