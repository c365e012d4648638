"""Adapters whose init moved the base: what the base becomes, and the same adapter as plain LoRA on the original.

Such an adapter acts on W − s·B₀·A₀, where B₀ and A₀ are its factors before training. On the original W it is plain LoRA
of twice the rank, exactly. Everything here is about one site's tensors and one config; files and models are elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind, Slot

AGAIN = ("init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "corda_config", "lora_ga_config")
"""Fields of a config that writing it as plain LoRA changes."""


def what_is_left(kind: Kind, slot: Slot, W: Tensor, factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """W − s·B·A, canonical (out, in) or as its kind has it.   [docs/math.md (60)]

    Args:
        kind: The kind of the site.
        slot: Its weight.
        W: Canonical, fp32 or wider.
        factors: A (r, in) and B (out, r).
        scale: s.
    """
    A, B = (factor.detach().to(device=W.device, dtype=W.dtype) for factor in factors)
    return W - kind.delta(slot, A, B) * scale


def as_plain(slot: Slot, A: Tensor, B: Tensor, initial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[A; A₀] and [B | −B₀], whose product is B·A − B₀·A₀.   [docs/math.md (62)]

    Args:
        slot: The weight.
        A: (r, in).
        B: (out, r).
        initial: A₀ and B₀, like A and B.

    Returns:
        (2r, in) and (out, 2r); with kernels, and expert by expert, as their kind lays them.
    """
    A0, B0 = (factor.to(like) for factor, like in zip(initial, (A, B), strict=True))
    E = max(slot.experts, 1)
    wide_A = torch.cat([A.reshape(E, -1, *A.shape[1:]), A0.reshape(E, -1, *A.shape[1:])], dim=1)
    if not slot.experts:
        return wide_A.flatten(0, 1), torch.cat([B, -B0], dim=1)
    wide_B = torch.cat([B.reshape(len(B), -1, E), -B0.reshape(len(B), -1, E)], dim=1)
    return wide_A.flatten(0, 1), wide_B.flatten(1)


def apart(slot: Slot, A: Tensor, B: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`as_plain`, backwards.

    Args:
        slot: The weight.
        A: (2r, in).
        B: (out, 2r).

    Returns:
        A (r, in) and B (out, r); A₀ and B₀.
    """
    E = max(slot.experts, 1)
    A, A0 = (part.flatten(0, 1) for part in A.reshape(E, -1, *A.shape[1:]).chunk(2, dim=1))
    if slot.experts:
        B, B0 = (part.flatten(1) for part in B.reshape(len(B), -1, E).chunk(2, dim=1))
    else:
        B, B0 = B.chunk(2, dim=1)
    return (A.contiguous(), B.contiguous()), (A0.contiguous(), -B0.contiguous())


def plain_config(config: LoraConfig) -> LoraConfig:
    """The config of such an adapter written as plain LoRA: twice the rank at the same scale.

    Args:
        config: As it was attached; it is only read.
    """
    more = math.sqrt(2) if config.use_rslora else 2
    return config.with_fields(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
        loftq_config={},
        corda_config=None,
        lora_ga_config=None,
        eva_config=None,
    )


def beginning(config: LoraConfig) -> dict[str, Any]:
    """What a plain config has lost of the one it was made from, as plain JSON values."""
    values = config.as_json()
    return {name: values[name] for name in AGAIN}
