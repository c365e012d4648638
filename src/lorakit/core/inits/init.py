"""Types for the table INITS: the type of its entries, and the argument and result types of their functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.factor import BOTH
from lorakit.core.kinds.kind import Fits, Kind, Shape, WeightSpec, every_kind_of_the_table
from lorakit.errors import ConfigError


@dataclass(frozen=True)
class InitContext:
    """The site whose factors an init creates, and the data that the init may use.

    Attributes:
        scale: alpha / r, or alpha / √r for rsLoRA.
        statistics: Dict from names to tensors (…) that `Init.digest` computed for this site; None if there is no data.
    """

    kind: Kind
    spec: WeightSpec
    r: int
    scale: float
    A_shape: Shape
    B_shape: Shape
    device: torch.device
    dtype: torch.dtype
    path: str
    read: Callable[[], Tensor]
    config: LoraConfig
    generator: torch.Generator | None = None
    statistics: Mapping[str, Tensor] | None = None

    def matrices(self, requirement: str = "") -> Tensor:
        """Return the base weight as g matrices, (g, out, n): one matrix, or one per expert; n includes the kernel size.

        A ConfigError if the weight belongs to a grouped convolution, is not finite, or has fewer directions than the
        rank.
        """
        self.check_ungrouped()
        W = self.read()
        if W.device.type != "meta" and not bool(torch.isfinite(W).all()):
            raise self.error("the base weight contains NaN or infinite values and cannot be decomposed.")
        W = W.mT if self.spec.in_first else W  # at this point, only expert weights can have the layout (in, out)
        W = W if self.spec.experts else self.kind.flat_weight(self.spec, W)[None]
        self.check_rank(min(W.shape[1:]), requirement)
        return W

    def check_ungrouped(self) -> None:
        """Raise a ConfigError if the site is a grouped convolution."""
        if self.spec.groups > 1:
            name = self.config.init_lora_weights
            text = f"init_lora_weights={name!r} does not support a convolution with {self.spec.groups} groups."
            raise self.error(text, what=str(name), field="init_lora_weights")

    def check_rank(self, most: int, requirement: str = "") -> None:
        """Raise a ConfigError, which begins with `requirement`, if the rank exceeds the number of directions."""
        if self.r > most:
            needs = requirement or f"init_lora_weights={self.config.init_lora_weights!r} needs at least r directions"
            text = f"{needs}; r is {self.r}, but the maximum at this site is {most}; lower r (here: use rank_pattern)."
            raise self.error(text, what=self.r, field="r")

    def check_collected(self, rank: float) -> None:
        """Raise a ConfigError if statistics were collected for another rank."""
        if rank != self.r:
            text = f"the statistics were collected for rank {rank:g}, but r is {self.r}; collect them with this config."
            raise self.error(text, what=self.r, field="r")

    def in_layout(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the factors A (g, r, n) and B (g, out, r) of the g `matrices` to the site's layout and dtype."""
        if self.spec.experts:
            B = B.permute(1, 2, 0)
        return (
            A.reshape(self.A_shape).to(self.dtype).contiguous(),
            B.reshape(self.B_shape).to(self.dtype).contiguous(),
        )

    def collected(self) -> Mapping[str, Tensor]:
        """Return this site's statistics as a dict from name to tensor (…) on its device, or raise a ConfigError."""
        if self.statistics is None:
            name = self.config.init_lora_weights
            text = f"init_lora_weights={name!r} needs data, but nothing was collected for this site (collect_for)."
            raise self.error(text, field="init_lora_weights")
        return {name: tensor.to(self.device) for name, tensor in self.statistics.items()}

    def error(self, message: str, *, what: str | int | None = None, field: str | None = None) -> ConfigError:
        """Return an error about this site, whose path is prepended to the message."""
        return ConfigError(f"{self.path}: {message}", what=what, where=self.path, field=field)


@dataclass(frozen=True)
class InitResult:
    """The initial A, (r, in) at a dense site, and B, (out, r), and a new base weight if the init computes one.

    Attributes:
        W: The canonical weight that replaces the base weight. If it is None and the init changes the base, s·B·A is
            subtracted from the base weight instead.
    """

    A: Tensor
    B: Tensor
    W: Tensor | None = None


@dataclass(frozen=True)
class Init:
    """One way to initialize A and B.

    Attributes:
        fits: Function that returns whether the init supports a kind. Only `every_kind` accepts user-defined kinds.
        changes_base: Whether the init replaces the base weight W. The new weight is W − s·B·A, unless `fill` returns
            another weight.
        is_identity: Whether a new adapter leaves the output unchanged, except for rounding (see `is_exact`).
        is_exact: Whether a new adapter leaves the output bitwise identical.
        needs: Data to collect beforehand: "" for none, "inputs" or "gradients".
        digest: Function that reduces a site's statistics to the few tensors that `fill` needs.
        family: Regular expression for other values of `init_lora_weights` that also select the init.
        requantizes: Whether the init may replace a quantized base weight; the new weight must then be requantized.
        takes_any_shape: Whether the init can fill A and B of any shape; some variants require this.
        draws_again: Whether A and B of a new adapter are first filled as by the init False, and these values discarded,
            so that the factors equal PEFT's under the same seed; PEFT creates random modules, then initializes them.
    """

    name: bool | str
    fill: Callable[[InitContext], InitResult]
    fits: Fits = every_kind_of_the_table
    changes_base: bool = False
    is_identity: bool = True
    is_exact: bool = True
    needs: str = ""
    digest: Callable[[InitContext, Any], dict[str, Tensor]] | None = None
    trains: frozenset[str] = BOTH
    family: str = ""
    requantizes: bool = False
    takes_any_shape: bool = False
    draws_again: bool = False


def zeros(context: InitContext, shape: Shape) -> Tensor:
    """Return zeros of the given shape, (r, in) or (out, r), on the site's device."""
    return torch.zeros(shape, device=context.device, dtype=context.dtype)


def normal(context: InitContext, shape: Shape, std: float) -> Tensor:
    """Return a tensor of the given shape, such as (r, in) or (out, r), with normally distributed values (mean 0)."""
    return torch.empty(shape, device=context.device, dtype=context.dtype).normal_(0.0, std, generator=context.generator)


def uniform(context: InitContext, shape: Shape, fan_in: int | None = None) -> Tensor:
    """Return a tensor such as (r, in), uniform within ±1/√fan_in; by default, the product of all axes but the first."""
    bound = 1.0 / math.sqrt(fan_in or math.prod(shape[1:]))
    values = torch.empty(shape, device=context.device, dtype=context.dtype)
    return values.uniform_(-bound, bound, generator=context.generator)


def balanced(context: InitContext, U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return A = √(S/|s|)·Vh (g, r, n) and B = ±U·√(S/|s|) (g, out, r) for the first r directions, so that s·B·A =
    U·S·Vh.

    U is (g, out, k), S (g, k), nonnegative, and Vh (g, k, n), with k at least r. A ConfigError if the scale s is zero.
    """
    if context.scale == 0:
        raise context.error("the scale is 0, so B·A cannot represent part of the base. Set a nonzero lora_alpha.")
    U, S, Vh = U[..., : context.r], S[:, : context.r], Vh[:, : context.r]
    root = (S / abs(context.scale)).sqrt()
    return root[..., None] * Vh, U * (root if context.scale > 0 else -root)[..., None, :]


def fresh_bias(context: InitContext, random: bool) -> Tensor:
    """Return the initial bias of B, (out,): zeros, or random values as in a dense layer with r inputs."""
    shape = (context.spec.out_features,)
    return uniform(context, shape, context.r) if random else zeros(context, shape)
