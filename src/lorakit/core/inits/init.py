"""What a row of the table INITS says, what it is given and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind, Shape, Slot


@dataclass(frozen=True)
class Blank:
    """What an init is given.

    Attributes:
        kind: The kind of the site.
        slot: Its geometry.
        r: Rank.
        scale: alpha / r, or alpha / √r.
        shapes: Shapes of A, (r, in) on a dense site, and of B, (out, r).
        device: Where the factor lives.
        dtype: dtype of A and B.
        path: The site, for messages.
        read: Reads the canonical base weight.
        config: The adapter's config, for the settings of an init.
        generator: Source of randomness, or None for torch's own.
        statistics: What was collected for this site beforehand, or None.
    """

    kind: Kind
    slot: Slot
    r: int
    scale: float
    shapes: tuple[Shape, Shape]
    device: torch.device
    dtype: torch.dtype
    path: str
    read: Callable[[], Tensor]
    config: LoraConfig
    generator: torch.Generator | None = None
    statistics: Any = None

    @property
    def A_shape(self) -> Shape:
        """Shape of A, (r, in) on a dense site."""
        return self.shapes[0]

    @property
    def B_shape(self) -> Shape:
        """Shape of B, (out, r) on a dense site."""
        return self.shapes[1]


@dataclass(frozen=True)
class Filled:
    """What an init returns.

    Attributes:
        A: (r, in) on a dense site.
        B: (out, r) on a dense site.
        W: A new canonical base weight, or None to leave it.
        trains: Which of "A" and "B" are trained.
    """

    A: Tensor
    B: Tensor
    W: Tensor | None = None
    trains: frozenset[str] = frozenset({"A", "B"})


@dataclass(frozen=True)
class Init:
    """One way to begin.

    Attributes:
        name: The value of `init_lora_weights` that asks for it.
        kinds: Names of the kinds it has a meaning on.
        changes_base: It replaces the base weight.
        is_identity: A fresh adapter changes no output.
        needs: What must be collected beforehand: "" nothing, "inputs" or "gradients".
        fill: Makes A and B.
    """

    name: bool | str
    kinds: tuple[str, ...]
    changes_base: bool
    is_identity: bool
    needs: str
    fill: Callable[[Blank], Filled]


def zeros(blank: Blank, shape: Shape) -> Tensor:
    """Zeros, of the given shape (r, in) or (out, r), on the site's device."""
    return torch.zeros(shape, device=blank.device, dtype=blank.dtype)


def normal(blank: Blank, shape: Shape, std: float) -> Tensor:
    """Normal numbers of mean 0, of the given shape (r, in) or (out, r)."""
    return torch.empty(shape, device=blank.device, dtype=blank.dtype).normal_(0.0, std, generator=blank.generator)


def uniform(blank: Blank, shape: Shape) -> Tensor:
    """Uniform numbers in ±1/√fan_in, of the given shape (r, in) or (out, r)."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, device=blank.device, dtype=blank.dtype).uniform_(-bound, bound, generator=blank.generator)


def fresh_bias(blank: Blank, random: bool) -> Tensor:
    """The bias that B begins with, (out,): zeros, or random as a dense layer of r inputs has it.

    Args:
        blank: The site.
        random: Whether a fresh adapter shall act.
    """
    shape = (blank.slot.out_features, blank.r)
    return uniform(blank, shape)[:, 0].contiguous() if random else zeros(blank, shape[:1])
