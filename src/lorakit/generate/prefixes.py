"""A prefix that several prompts have in common: the base processes it once, and all rows share the result.

A row can share the result if it uses only the base within the prefix, that is, if it has no adapter, or has an
Activated LoRA (aLoRA) adapter that is invoked after the prefix. Other adapters change the keys and values from the
first token on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lorakit.core import disable, prompt_offset, waits_for_tokens
from lorakit.core.model.index import find_state
from lorakit.errors import ModelError, UsageError

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # names used by transformers, newest first

WORTHWHILE_TOKENS = 16
"""Minimum number of tokens worth sharing; below it, the extra forward pass costs more than it saves."""


class Cache(Protocol):
    """The part of the transformers key-value cache interface that generation uses."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the cache `repeats` times."""


@dataclass(frozen=True)
class Prefix:
    """A common prefix of several prompts, already processed by the base.

    Attributes:
        tokens: Token ids of the prefix.
        cache: The model's key-value cache for one row; it is only copied, never modified.
    """

    tokens: tuple[int, ...]
    cache: Cache

    def of_rows(self, rows: int) -> Cache:
        """Return a copy of the cache, expanded to the given number of rows."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def read_prefix(model: nn.Module, tokens: Sequence[int], device: torch.device | None = None) -> Prefix:
    """Process a prefix, at least one token, with the base alone, even if adapters are active, and return its cache.

    Raises:
        ModelError: The model does not return a cache that can be expanded to several rows.
    """
    ids = torch.tensor([list(tokens)], device=device or next(model.parameters()).device)
    base = contextlib.nullcontext() if find_state(model) is None else disable(model)
    with torch.no_grad(), base:
        output = model(input_ids=ids, use_cache=True)
    cache = next((output[name] for name in CACHE_NAMES if name in output), None)
    if cache is None or not hasattr(cache, "batch_repeat_interleave"):
        raise ModelError(
            f"{type(model).__name__} does not return a cache that several rows can share.", what=type(model).__name__
        )
    return Prefix(tuple(int(token) for token in tokens), cache)


def shared_tokens(model: nn.Module, prompts: Sequence[Sequence[int]], adapters: Sequence[Sequence[str]]) -> int:
    """Return the length of the longest common prefix within which every row uses only the base.

    `adapters` has the names of each row's active adapters. The prefix never covers a whole prompt, because at least
    one token must remain to be processed. It is 0 if the model has no aLoRA adapter, no row uses an adapter, or sharing
    would save nothing.
    """
    if len(prompts) < 2 or not waits_for_tokens(model) or not any(adapters):
        return 0
    first, length = prompts[0], min(len(prompt) for prompt in prompts) - 1
    for prompt, names in zip(prompts, adapters, strict=True):
        agreed = next((i for i, (one, two) in enumerate(zip(first, prompt, strict=False)) if one != two), length)
        length = min([length, agreed, *(_begin(model, prompt, name) for name in names)])
    return length if length >= WORTHWHILE_TOKENS else 0


def check_prefix(
    model: nn.Module, prefix: Prefix, prompts: Sequence[Sequence[int]], adapters: Sequence[Sequence[str]]
) -> None:
    """Check that every row can use a prefix.

    Raises:
        UsageError: A prompt does not start with the prefix or has no further tokens, or an adapter is active within the
            prefix.
    """
    size = len(prefix.tokens)
    for row, (prompt, names) in enumerate(zip(prompts, adapters, strict=True)):
        if tuple(prompt[:size]) != prefix.tokens:
            text = f"prompt {row + 1} of {len(prompts)} does not start with the prefix of {size} tokens."
            raise UsageError(text, what=row, field="prompts")
        if len(prompt) == size:
            text = f"prompt {row + 1} of {len(prompts)} has no tokens after the prefix; add at least one."
            raise UsageError(text, what=row, field="prompts")
        for name in names:
            if _begin(model, prompt, name) < size:
                text = (
                    f"Adapter {name!r} is active within the prefix of {size} tokens in row {row + 1}, but the prefix "
                    "was processed by the base alone. The prefix can be shared only by rows that have no adapter or "
                    "whose adapter starts after the prefix."
                )
                raise UsageError(text, what=name, field="prefix")


def _begin(model: nn.Module, prompt: Sequence[int], name: str) -> int:
    """Return the first position at which an adapter is active in a prompt, or the prompt's length if there is none."""
    return len(prompt) - prompt_offset(model, torch.tensor(list(prompt)), name)
