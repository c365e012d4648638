"""Activated LoRA (aLoRA): the adapter is active from its invocation tokens onward; before them, only the base runs.

Keys and values before the invocation tokens are those of the base, so a KV cache filled by the base can be reused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds.kind import only_dense
from lorakit.core.variants.variant import At, Variant
from lorakit.errors import ConfigError, RouteError


def last_invocation(input_ids: Tensor, tokens: Sequence[int], visible: Tensor | None = None) -> Tensor:
    """Return the distance of the last invocation tokens from the end of each row, (rows,).   [docs/math.md (90)]

    The distance, from the first of these tokens, is 0 for rows of `input_ids` (rows, length) without them. An
    occurrence with padding, false in the mask `visible` (rows, length), does not count.
    """
    rows, length = input_ids.shape
    size = len(tokens)
    if size > length or size == 0:
        return input_ids.new_zeros(rows, dtype=torch.int64)
    wanted = torch.tensor(list(tokens), dtype=input_ids.dtype, device=input_ids.device)
    matches = (input_ids.unfold(1, size, 1) == wanted).all(-1)  # (rows, length - size + 1)
    if visible is not None:
        matches = matches & visible.bool().unfold(1, size, 1).all(-1)
    numbers = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    last = (matches * numbers).amax(1)
    return torch.where(last > 0, length + 1 - last, 0)


def _tokens(config: LoraConfig) -> Sequence[int]:
    tokens = config.alora_invocation_tokens
    if not tokens:
        raise ConfigError.of("alora_invocation_tokens", tokens, "a list of token ids")
    return tokens


def _output(at: At) -> Tensor:
    """Return z from the start of the last invocation onward, and zeros before it.   [docs/math.md (90)]

    Both z and the result have the shape (rows, positions, out).

    Source:
        Greenewald et al. 2025, arXiv:2504.12397, section 3.
    """
    if at.mask is None:
        raise RouteError(
            "An aLoRA adapter is active, but the positions of its invocation tokens are unknown, because the model it "
            "is attached to was not called with input_ids. Pass input_ids, or make the call inside "
            "`with lorakit.core.invoked(model, input_ids):`.",
            field="alora_invocation_tokens",
        )
    return torch.where(at.mask(at.z), at.z, 0)  # not a multiplication, because z can be infinite before the invocation


ALORA = Variant(
    name="alora",
    title="aLoRA",
    field="alora_invocation_tokens",
    fits=only_dense,
    output=_output,
    update="its update depends on token positions",
    invocation=_tokens,
    combine="have different invocation tokens",
)
