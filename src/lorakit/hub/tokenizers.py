"""Load and hash tokenizers, and add tokens to them.

An adapter records the hashes of the tokenizer and chat template it was trained with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError, ModelError
from lorakit.hub.models import call_loader
from lorakit.hub.quiet import quiet_transformers
from lorakit.hub.sources import ModelSource, require, resolve


def load_tokenizer(model: str | os.PathLike[str] | ModelSource) -> Any:
    """Load the tokenizer of a model.

    Args:
        model: Argument or result of `resolve`.

    Returns:
        A transformers tokenizer.

    Raises:
        ModelError: The model was not found, or its tokenizer is missing or cannot be read.
    """
    source = model if isinstance(model, ModelSource) else resolve(model)
    require(source, weights=False, tokenizer=True)
    import transformers

    with quiet_transformers(bars=source.kind == "hub"):
        return call_loader(source, transformers.AutoTokenizer.from_pretrained)


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 of everything that maps text to ids; the chat template has its own hash.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        64 hexadecimal digits; equal before and after saving, and independent of padding and truncation settings.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)  # these two are settings of the last call, stored in the same object
        rules.pop("truncation", None)
    else:
        rules = {"vocab": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return _digest(json.dumps([rules, special], sort_keys=True))


def chat_template_hash(tokenizer: Any) -> str | None:
    """Return the SHA-256 of the chat template.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        64 hexadecimal digits, or None if there is no template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    return _digest(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class AddedTokens:
    """Tokens added to a tokenizer.

    Attributes:
        ids: Token -> id.
        pieces: Id -> the ids of its text before the token was added, in order; without unknown ones.
        vocabulary: Number of ids from 0 to the largest one.
    """

    ids: dict[str, int]
    pieces: dict[int, tuple[int, ...]]
    vocabulary: int


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> AddedTokens:
    """Add tokens to a tokenizer; each is matched literally wherever its text occurs, and decoded to that text.

    Args:
        tokenizer: A transformers tokenizer, changed in place unless an error is raised.
        tokens: Their texts, all different.

    Returns:
        The added tokens.

    Raises:
        ConfigError: The tokenizer has one of the tokens already.
        ModelError: The tokenizer does not support adding tokens.
    """
    known = _vocabulary(tokenizer)
    written = {token: tuple(tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]) for token in tokens}
    for token in tokens:
        number = known.get(token)
        if number is None and len(written[token]) == 1 and tokenizer.decode(list(written[token])) == token:
            number = written[token][0]
        if number is not None:
            raise ConfigError(
                f"new_tokens contains {token!r}, which the tokenizer has already (id {number}). Leave it out.",
                what=token,
                field="new_tokens",
            )
    from tokenizers import AddedToken

    try:
        count = tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    except NotImplementedError as cause:
        raise _no_vocabulary(tokenizer) from cause
    after = _vocabulary(tokenizer)
    ids = {token: after[token] for token in tokens if token in after and token not in known}
    if count != len(tokens) or len(set(ids.values())) < len(tokens):
        raise _no_vocabulary(tokenizer)
    unknown = tokenizer.unk_token_id
    pieces = {ids[token]: tuple(i for i in written[token] if i != unknown) for token in tokens}
    return AddedTokens(ids, pieces, 1 + max(after.values()))


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    try:
        return dict(tokenizer.get_vocab())
    except (AttributeError, NotImplementedError) as cause:
        raise _no_vocabulary(tokenizer) from cause


def _no_vocabulary(tokenizer: Any) -> ModelError:
    return ModelError(
        f"new_tokens: this {type(tokenizer).__name__} does not support adding tokens. Use a base with a tokenizer that "
        "does, or leave new_tokens out."
    )
