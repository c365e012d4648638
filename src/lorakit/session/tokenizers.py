"""The tokenizers of a session: that of the base, and those that adapters were trained and saved with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from lorakit import data, hub
from lorakit.core import AdapterFiles


class SavedTokenizer(data.Tokenizer, Protocol):
    """The part of the transformers tokenizer interface that training runs and commands use."""

    def get_vocab(self) -> dict[str, int]:
        """Return a dict from token to id."""

    def save_pretrained(self, save_directory: Path) -> tuple[str, ...]:
        """Write the tokenizer's files to a directory and return their names."""


def tokenizer_for(source: hub.ModelSource, adapters: Sequence[AdapterFiles]) -> tuple[SavedTokenizer, str]:
    """Return the tokenizer to use, preferably the one that the adapters were trained and saved with.

    Args:
        source: The source of the base model.
        adapters: Files of the adapters.

    Returns:
        The saved tokenizer that contains all tokens of the other saved tokenizers, if there is one and all have the
            same chat template; otherwise, the model's tokenizer, with a warning if adapters have others, or "".

    Raises:
        ModelError: Neither the model nor the adapters have a tokenizer, or the tokenizer cannot be read.
    """
    found = [own for files in adapters if (own := hub.adapter_tokenizer(files.folder)) is not None]
    distinct = {(hub.tokenizer_hash(own), hub.chat_template_hash(own)): own for own in found}
    largest = _largest(list(distinct.values()))
    if largest is not None:
        return largest, ""
    warning = "the adapters have different tokenizers or chat templates; using the model's tokenizer." if found else ""
    return hub.load_tokenizer(source), warning


def _largest(tokenizers: Sequence[SavedTokenizer]) -> SavedTokenizer | None:
    """Return the tokenizer that contains the others' tokens and ids; None if there is none or chat templates differ."""
    tokens = [set(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    for tokenizer, own in zip(tokenizers, tokens, strict=True):
        if all(own >= other for other in tokens) and all(
            t.chat_template == tokenizer.chat_template for t in tokenizers
        ):
            return tokenizer
    return None


def own_tokenizer(folder: Path, tokenizer: data.Tokenizer) -> SavedTokenizer | None:
    """Return the tokenizer in an adapter's directory if it differs from the base's, else None.

    Args:
        folder: The adapter's directory.
        tokenizer: The base's tokenizer.

    Raises:
        ModelError: The tokenizer cannot be read.
    """
    found = hub.adapter_tokenizer(folder)
    if found is None:
        return None
    same = hub.tokenizer_hash(found) == hub.tokenizer_hash(tokenizer)
    return None if same and hub.chat_template_hash(found) == hub.chat_template_hash(tokenizer) else found


def common_tokenizer(source: hub.ModelSource, folders: Iterable[Path]) -> SavedTokenizer:
    """Return the base's tokenizer, with the adapters' chat template if that alone differs and all have the same."""
    tokenizer = hub.load_tokenizer(source)
    found = [own_tokenizer(folder, tokenizer) for folder in folders]
    owned = [own for own in found if own is not None and hub.tokenizer_hash(own) == hub.tokenizer_hash(tokenizer)]
    templates = {hub.chat_template_hash(own) for own in owned}
    return owned[0] if len(owned) == len(found) and len(templates) == 1 else tokenizer
