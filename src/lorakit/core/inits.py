"""The table INITS: how a fresh factor is filled.

Each row is a function that fills the side that learns and leaves the kind's zero side at zero, so that a
fresh adapter changes no output; only "random" fills both, for tests and experiments. Factors are made on the
device of their site, in fp32. An init may return a new base weight (none here does).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.kinds import Kind, Shape
from lorakit.errors import ConfigError, NotYetSupported, nearest


@dataclass(frozen=True)
class Blank:
    """What an init is given.

    Attributes:
        kind: The kind of the site.
        A_shape: Shape of A, (r, in) on a dense site.
        B_shape: Shape of B, (out, r) on a dense site.
        device: Where the factor lives.
        dtype: dtype of A and B.
        generator: Source of randomness, or None for torch's own.
    """

    kind: Kind
    A_shape: Shape
    B_shape: Shape
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Filled:
    """What an init returns: A, B, and a new canonical base weight, (out, in), or None to leave it."""

    A: Tensor
    B: Tensor
    W: Tensor | None = None


@dataclass(frozen=True)
class Init:
    """One way to begin.

    Attributes:
        name: The value of `init_lora_weights` that asks for it.
        changes_base: It replaces the base weight.
        is_identity: A fresh adapter changes no output.
        fill: Makes A and B.
    """

    name: bool | str
    changes_base: bool
    is_identity: bool
    fill: Callable[[Blank], Filled]


def _kaiming(blank: Blank) -> Filled:
    """One side uniform in ±1/√fan_in (an Embedding's: standard normal), the zero side zero.  [docs/math.md (5), (6)]

    Source: He et al. 2015 with a = √5, as nn.Linear's own start; Hu et al. 2021, section 4.1.
    """
    if blank.kind.zero_side == "A":
        return Filled(_zeros(blank, blank.A_shape), _normal(blank, blank.B_shape, 1.0))
    return Filled(_uniform(blank, blank.A_shape), _zeros(blank, blank.B_shape))


def _gaussian(blank: Blank) -> Filled:
    """One side normal with standard deviation 1/r, the zero side zero.  [docs/math.md (5)]."""
    std = 1.0 / blank.A_shape[0]
    if blank.kind.zero_side == "A":
        return Filled(_zeros(blank, blank.A_shape), _normal(blank, blank.B_shape, std))
    return Filled(_normal(blank, blank.A_shape, std), _zeros(blank, blank.B_shape))


def _random(blank: Blank) -> Filled:
    """Both sides random, so the adapter acts from the start; for tests and experiments."""
    if blank.kind.zero_side == "A":
        return Filled(_normal(blank, blank.A_shape, 1.0), _normal(blank, blank.B_shape, 1.0))
    return Filled(_uniform(blank, blank.A_shape), _uniform(blank, blank.B_shape))


def _zeros(blank: Blank, shape: Shape) -> Tensor:
    return torch.zeros(shape, device=blank.device, dtype=blank.dtype)


def _normal(blank: Blank, shape: Shape, std: float) -> Tensor:
    return torch.empty(shape, device=blank.device, dtype=blank.dtype).normal_(0.0, std, generator=blank.generator)


def _uniform(blank: Blank, shape: Shape) -> Tensor:
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, device=blank.device, dtype=blank.dtype).uniform_(-bound, bound, generator=blank.generator)


INITS: tuple[Init, ...] = (
    Init(name=True, changes_base=False, is_identity=True, fill=_kaiming),
    Init(name="gaussian", changes_base=False, is_identity=True, fill=_gaussian),
    Init(name=False, changes_base=False, is_identity=False, fill=_random),
)

LATER = ("pissa", "olora", "orthogonal", "eva", "corda", "loftq", "lora_ga", "mica")
"""Names that the field knows and that are not built yet."""


def init_named(name: bool | str) -> Init:
    """The row for a value of `init_lora_weights`.

    Raises:
        NotYetSupported: A method that is not built yet.
        ConfigError: No such init; the message names the nearest.
    """
    for init in INITS:
        if init.name is name or (isinstance(name, str) and init.name == name.lower()):
            return init
    if any(str(name).lower().startswith(method) for method in LATER):
        raise NotYetSupported(f"init_lora_weights is {name!r}: this init is not built yet. Use True or 'gaussian'.")
    hint = nearest(str(name), ["gaussian", *LATER], 1)
    raise ConfigError(
        f"init_lora_weights is {name!r}; it must be True, False or 'gaussian'"
        + (f". Did you mean {hint[0]!r}?" if hint else ".")
    )
