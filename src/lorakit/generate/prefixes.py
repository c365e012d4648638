"""Common prefix of several prompts, processed once by the base and shared by all rows that use the base in it.

These are rows without an adapter, and rows with an Activated LoRA adapter that is invoked after the prefix. Other
adapters change keys and values from the first token on, so their rows cannot share a prefix.
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

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # names in transformers, newest first

WORTHWHILE_TOKENS = 16
"""Minimum number of shared tokens; for fewer, a separate forward costs more than it saves."""


class Cache(Protocol):
    """The part of a transformers key-value cache that generation uses."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the cache of each row."""


@dataclass(frozen=True)
class Prefix:
    """First tokens of several prompts, already processed by the base.

    Attributes:
        tokens: Token ids.
        cache: Key-value cache of the model for one row; it is copied, never written to.
    """

    tokens: tuple[int, ...]
    cache: Cache

    def of_rows(self, rows: int) -> Cache:
        """Return a copy of the cache for several rows."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def read_prefix(model: nn.Module, tokens: Sequence[int], device: torch.device | None = None) -> Prefix:
    """Process a prefix with the base, regardless of active adapters.

    Args:
        model: A causal language model in eval mode.
        tokens: Token ids of the prefix, at least one.
        device: Device of the ids; None means that of the model's first parameter.

    Raises:
        ModelError: The model returns no cache that can be copied to several rows.
    """
    ids = torch.tensor([list(tokens)], device=device or next(model.parameters()).device)
    base = contextlib.nullcontext() if find_state(model) is None else disable(model)
    with torch.no_grad(), base:
        output = model(input_ids=ids, use_cache=True)
    cache = next((output[name] for name in CACHE_NAMES if name in output), None)
    if cache is None or not hasattr(cache, "batch_repeat_interleave"):
        raise ModelError(f"{type(model).__name__} has no cache that several rows can share.")
    return Prefix(tuple(int(token) for token in tokens), cache)


def shared_tokens(model: nn.Module, prompts: Sequence[Sequence[int]], adapters: Sequence[Sequence[str]]) -> int:
    """Return the length of the common prefix in which every row uses the base.

    Each prompt keeps at least one token after the prefix.

    Args:
        model: A model with or without adapters.
        prompts: Token ids of each row.
        adapters: Names of the active adapters of each row; empty for the base.

    Returns:
        Number of tokens; 0 if the model has no aLoRA adapter, no row uses an adapter, or sharing would gain nothing.
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
    """Check that every row can start from a prefix.

    Raises:
        UsageError: A prompt does not start with the prefix, or an adapter is active within the prefix.
    """
    size = len(prefix.tokens)
    for row, (prompt, names) in enumerate(zip(prompts, adapters, strict=True)):
        if tuple(prompt[:size]) != prefix.tokens or len(prompt) <= size:
            raise UsageError(f"prompt {row + 1} of {len(prompts)} does not start with the prefix of {size} tokens.")
        for name in names:
            if _begin(model, prompt, name) < size:
                raise UsageError(
                    f"Adapter {name!r} is active within the prefix of {size} tokens in row {row + 1}, which the base "
                    "has processed. Only base rows and adapters that start later can share it.",
                    what=name,
                    field="prefix",
                )


def _begin(model: nn.Module, prompt: Sequence[int], name: str) -> int:
    """Return the first position at which an adapter is active in a prompt; the prompt's length if it is not."""
    return len(prompt) - prompt_offset(model, torch.tensor(list(prompt)), name)
