"""A beginning that several prompts share, read once by the base, and used by every row that is the base there.

Rows of the base are, and so are rows of Activated LoRA before their invocation. Other adapters have keys and values
of their own from the first token on, so they cannot share.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import disable, prompt_offset, waits_for_tokens
from lorakit.core.model.index import find_state
from lorakit.errors import ModelError, UsageError

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # what transformers calls it, newest first

WORTHWHILE_TOKENS = 16
"""Fewer shared tokens than these are not read apart: a forward of its own costs more than it saves."""


@dataclass(frozen=True)
class Prefix:
    """The first tokens of some prompts, as the base has read them.

    Attributes:
        tokens: Their ids.
        cache: The model's own cache of their keys and values, one row; it is copied, never written to.
    """

    tokens: tuple[int, ...]
    cache: Any

    def of_rows(self, rows: int) -> Any:
        """A cache with these tokens in so many rows."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def read_prefix(model: nn.Module, tokens: Sequence[int], device: torch.device | None = None) -> Prefix:
    """Let the base read a beginning, whatever adapter is active.

    Args:
        model: A causal language model in eval mode.
        tokens: The beginning's ids, at least one.
        device: Where the ids shall live; None is that of the model's first parameter.

    Raises:
        ModelError: The model returns no cache that can be copied to more rows.
    """
    place = next(model.parameters()).device if device is None else device
    ids: Tensor = torch.tensor([list(tokens)], device=place)
    base = contextlib.nullcontext() if find_state(model) is None else disable(model)
    with torch.no_grad(), base:
        output = model(input_ids=ids, use_cache=True)
    cache = next((output[name] for name in CACHE_NAMES if name in output), None)
    if not hasattr(cache, "batch_repeat_interleave"):
        raise ModelError(f"A {type(model).__name__} has no cache that several rows can begin from.")
    return Prefix(tuple(int(token) for token in tokens), cache)


def shared_tokens(model: nn.Module, prompts: Sequence[Sequence[int]], adapters: Sequence[Sequence[str]]) -> int:
    """How many tokens all these prompts begin with while every row still is the base; one token at least is left.

    Args:
        model: A model with or without adapters.
        prompts: Ids per row.
        adapters: Per row the adapters that act; none is the base.

    Returns:
        Their number; 0 if no adapter begins later than its prompt, or where reading them once would gain nothing.
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
    """Refuse a prefix that some row cannot begin from.

    Raises:
        UsageError: A prompt does not begin with it, or an adapter acts in it.
    """
    size = len(prefix.tokens)
    for row, (prompt, names) in enumerate(zip(prompts, adapters, strict=True)):
        if tuple(prompt[:size]) != prefix.tokens or len(prompt) <= size:
            raise UsageError(f"prompt {row + 1} of {len(prompts)} does not go on from the prefix of {size} tokens.")
        for name in names:
            if _begin(model, prompt, name) < size:
                raise UsageError(
                    f"Adapter {name!r} acts within the prefix of {size} tokens in row {row + 1}, and the base has read "
                    "that. Only base rows and adapters that begin later share one."
                )


def _begin(model: nn.Module, prompt: Sequence[int], name: str) -> int:
    """The first position at which an adapter acts in a prompt; the prompt's length if it does not."""
    return len(prompt) - prompt_offset(model, torch.tensor(list(prompt)), name)
