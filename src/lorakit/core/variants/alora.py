"""Activated LoRA: the adapter acts from its invocation tokens on, and before them the model is the base.

What comes before the invocation has the base's keys and values, so a cache that the base filled can be used again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind
from lorakit.core.variants.variant import NO_SETTING, At, Setting, Variant
from lorakit.errors import ConfigError, RouteError


def last_invocation(input_ids: Tensor, tokens: Sequence[int], visible: Tensor | None = None) -> Tensor:
    """Where the last occurrence of some tokens begins in each row.   [docs/math.md (90)]

    Args:
        input_ids: (rows, length), whole numbers.
        tokens: The invocation tokens, in order.
        visible: (rows, length), true where a token counts; an occurrence that touches padding is none.

    Returns:
        (rows,) int64: how many positions there are from its first token to the end of the row, 0 where it is not there.
    """
    rows, length = input_ids.shape
    size = len(tokens)
    if size > length or size == 0:
        return input_ids.new_zeros(rows, dtype=torch.int64)
    wanted = torch.tensor(list(tokens), dtype=input_ids.dtype, device=input_ids.device)
    found = (input_ids.unfold(1, size, 1) == wanted).all(-1)  # (rows, length - size + 1)
    if visible is not None:
        found = found & visible.bool().unfold(1, size, 1).all(-1)
    numbers = torch.arange(1, found.shape[1] + 1, device=found.device)
    last = (found * numbers).amax(1)
    return torch.where(last > 0, length + 1 - last, 0)


def _positions(ids: Tensor, config: LoraConfig, visible: Tensor | None) -> Tensor:
    """On how many of the last positions of each row the adapter acts, (rows,) int64."""
    return last_invocation(ids, _tokens(config), visible)


def _span(config: LoraConfig) -> int:
    return len(_tokens(config))


def _tokens(config: LoraConfig) -> Sequence[int]:
    tokens = config.alora_invocation_tokens
    if not tokens:
        raise ConfigError(
            f"alora_invocation_tokens is {tokens!r}; it must be a list of token ids.",
            what=tokens,
            field="alora_invocation_tokens",
        )
    return tokens


def _setting(config: LoraConfig, path: str) -> Setting | None:
    return NO_SETTING if config.alora_invocation_tokens is not None else None


def _fits(kind: Kind) -> bool:
    return kind.is_dense


def _output(at: At) -> Tensor:
    """The addition is z from the start of the last invocation on, and zero before it.   [docs/math.md (90)]

    Takes and returns (rows, positions, out).

    Source:
        Greenewald et al. 2025, arXiv:2504.12397, section 3.
    """
    if at.mask is None:
        raise RouteError(
            "An aLoRA adapter is active, and where its invocation tokens stand is not known: the model it was attached "
            "to was not called with input_ids. Pass input_ids, or open lorakit.core.invoked(model, input_ids) around "
            "the call."
        )
    return torch.where(at.mask(at.z), at.z, 0)  # not a product: what is not finite before the start stays out


ALORA = Variant(
    name="alora",
    title="aLoRA",
    field="alora_invocation_tokens",
    setting=_setting,
    fits=_fits,
    output=_output,
    update=None,
    unmergeable_reason="what it adds depends on where a token stands",
    positions=_positions,
    span=_span,
    must_agree="act after different invocation tokens",
)
