"""Tokens that are added to a tokenizer: what can be added, which ids they get, and what their text was until then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError, ModelError


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that were added.

    Attributes:
        ids: Token -> its id.
        pieces: Its id -> the ids that its text was written with until then, in order; without unknown ones.
        vocabulary: Ids that the tokenizer knows now, counted from 0 to the largest.
    """

    ids: dict[str, int]
    pieces: dict[int, tuple[int, ...]]
    vocabulary: int


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> AddedTokens:
    """Add tokens to a tokenizer, each literally: found wherever its text stands, and written out when ids become text.

    Args:
        tokenizer: A transformers tokenizer, changed in place, but not where this is refused.
        tokens: Their texts, all different.

    Returns:
        What was added.

    Raises:
        ConfigError: A token is one of the tokenizer's already.
        ModelError: The tokenizer has no vocabulary that can grow.
    """
    known = _vocabulary(tokenizer)
    written = {token: tuple(tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]) for token in tokens}
    for token in tokens:
        number = known.get(token)
        if number is None and len(written[token]) == 1 and tokenizer.decode(list(written[token])) == token:
            number = written[token][0]
        if number is not None:
            raise ConfigError(
                f"new_tokens holds {token!r}, which is a token of this tokenizer already (id {number}), so there is "
                "nothing to add. Leave it out."
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
        f"new_tokens: this {type(tokenizer).__name__} has no vocabulary that tokens can be added to. Use a base whose "
        "tokenizer has one, or leave new_tokens out."
    )
