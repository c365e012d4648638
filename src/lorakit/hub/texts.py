"""Hashes by which an adapter knows the tokenizer and the chat template that it was trained with."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a tokenizer turns text into ids; the chat template has a hash of its own.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        64 hexadecimal digits; equal before and after saving, and whatever padding or truncation was last asked for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)  # these two are settings of the last call, kept in the same object
        rules.pop("truncation", None)
    else:
        rules = {"vocab": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return _digest(json.dumps([rules, special], sort_keys=True))


def chat_template_hash(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        64 hexadecimal digits, or None where there is no template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    return _digest(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
