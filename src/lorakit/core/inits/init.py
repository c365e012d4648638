"""What a row of the table INITS says, what it is given and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds import Fits, Kind, Shape, WeightSpec
from lorakit.errors import ConfigError

BOTH = frozenset({"A", "B"})


@dataclass(frozen=True)
class InitContext:
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
        statistics: What was made of the data for this site beforehand, name -> tensor, or None.
    """

    kind: Kind
    slot: WeightSpec
    r: int
    scale: float
    shapes: tuple[Shape, Shape]
    device: torch.device
    dtype: torch.dtype
    path: str
    read: Callable[[], Tensor]
    config: LoraConfig
    generator: torch.Generator | None = None
    statistics: Mapping[str, Tensor] | None = None

    @property
    def A_shape(self) -> Shape:
        """Shape of A, (r, in) on a dense site."""
        return self.shapes[0]

    @property
    def B_shape(self) -> Shape:
        """Shape of B, (out, r) on a dense site."""
        return self.shapes[1]

    def matrices(self) -> Tensor:
        """The base weight as matrices, (g, out, n): one, or one per expert; a kernel lies flat in the columns.

        Raises:
            ConfigError: It is a grouped convolution's, or holds numbers that are not finite.
        """
        if self.slot.groups > 1:
            raise ConfigError(
                f"{self.path}: init_lora_weights is {self.config.init_lora_weights!r}, which has no meaning on a "
                f"convolution of {self.slot.groups} groups. Leave the module out, or use True.",
                where=self.path,
            )
        W = self.read()
        if W.device.type != "meta" and not bool(torch.isfinite(W).all()):
            raise ConfigError(
                f"{self.path}: the base weight holds NaN or infinite numbers and cannot be decomposed.", where=self.path
            )
        if self.slot.experts:
            return W.mT if self.slot.in_first else W
        return self.kind.flat_weight(self.slot, W)[None]

    def check_rank(self, most: int, said: str = "") -> None:
        """Refuse a rank for which the weight has too few directions.

        Args:
            most: The largest rank there is.
            said: What the init needs, in words; that r is at most so much where nothing is given.

        Raises:
            ConfigError: r is larger.
        """
        if self.r > most:
            said = said or f"init_lora_weights={self.config.init_lora_weights!r} needs as many directions as r"
            raise ConfigError(
                f"{self.path}: {said}; r is {self.r}, and at most {most} is possible here. Lower r (rank_pattern for "
                "this module alone).",
                where=self.path,
            )

    def laid(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the matrices as a site holds them, in the dtype of the factor.

        Args:
            A: (g, r, n).
            B: (g, out, r).

        Returns:
            A (r, in) and B (out, r) of a dense site; with kernels and experts as their kind lays them.
        """
        if self.slot.experts:
            B = B.permute(1, 2, 0)
        return (
            A.reshape(self.A_shape).to(self.dtype).contiguous(),
            B.reshape(self.B_shape).to(self.dtype).contiguous(),
        )

    def found(self) -> Mapping[str, Tensor]:
        """What was made of the data for this site: name -> tensor (…), where the site is.

        Raises:
            ConfigError: Nothing was collected.
        """
        if self.statistics is None:
            raise ConfigError(
                f"{self.path}: init_lora_weights is {self.config.init_lora_weights!r}, which looks at data, and "
                "nothing was collected for this site. Give attach the `statistics` that lorakit.core.collect_for "
                "makes.",
                where=self.path,
            )
        return {name: tensor.to(self.device) for name, tensor in self.statistics.items()}


@dataclass(frozen=True)
class InitResult:
    """What an init returns.

    Attributes:
        A: (r, in) on a dense site.
        B: (out, r) on a dense site.
        W: The canonical weight that takes the base's place, where it is another than W − s·B·A.
    """

    A: Tensor
    B: Tensor
    W: Tensor | None = None


@dataclass(frozen=True)
class Init:
    """One way to begin.

    Attributes:
        name: The value of `init_lora_weights` that asks for it.
        fits: Kind -> whether it has a meaning on it. One that is not `every_kind` fits no kind that a user made.
        changes_base: It replaces the base weight: by W − s·B·A, unless `fill` gives another.
        is_identity: A fresh adapter changes no output, if not to the bit (`is_exact`).
        needs: What must be collected beforehand: "" nothing, "inputs" or "gradients".
        fill: Makes A and B.
        is_exact: A fresh adapter changes no bit of the output.
        trains: Which of "A" and "B" are trained.
        digest: From what was collected for a site to the few tensors that `fill` needs of it.
        family: A regular expression for other values that ask for it.
        requantises: It may replace a base weight that is stored in few bits, and so round it a second time.
        takes_any_shape: It fills A and B whatever their shapes are, and so fits variants with shapes of their own.
    """

    name: bool | str
    fits: Fits
    changes_base: bool
    is_identity: bool
    needs: str
    fill: Callable[[InitContext], InitResult]
    is_exact: bool = True
    trains: frozenset[str] = BOTH
    digest: Callable[[InitContext, Any], dict[str, Tensor]] | None = None
    family: str = ""
    requantises: bool = False
    takes_any_shape: bool = False


def zeros(blank: InitContext, shape: Shape) -> Tensor:
    """Zeros, of the given shape (r, in) or (out, r), on the site's device."""
    return torch.zeros(shape, device=blank.device, dtype=blank.dtype)


def normal(blank: InitContext, shape: Shape, std: float) -> Tensor:
    """Normal numbers of mean 0, of the given shape (r, in) or (out, r)."""
    return torch.empty(shape, device=blank.device, dtype=blank.dtype).normal_(0.0, std, generator=blank.generator)


def uniform(blank: InitContext, shape: Shape) -> Tensor:
    """Uniform numbers in ±1/√fan_in, of the given shape (r, in) or (out, r)."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, device=blank.device, dtype=blank.dtype).uniform_(-bound, bound, generator=blank.generator)


def balanced(blank: InitContext, U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """A = √(S/|s|)·Vh and B = ±U·√(S/|s|), so that s·B·A = U·S·Vh.

    Args:
        blank: Its scale is s.
        U: (g, out, r).
        S: Not negative, (g, r).
        Vh: (g, r, n).

    Returns:
        A (g, r, n) and B (g, out, r).

    Raises:
        ConfigError: The scale is zero.
    """
    if blank.scale == 0:
        raise ConfigError(
            f"{blank.path}: the scale is 0, so no B·A can stand for a part of the base. Give an alpha.",
            where=blank.path,
        )
    root = (S / abs(blank.scale)).sqrt()
    return root[..., None] * Vh, U * (root if blank.scale > 0 else -root)[..., None, :]


def fresh_bias(blank: InitContext, random: bool) -> Tensor:
    """The bias that B begins with, (out,): zeros, or random as a dense layer of r inputs has it.

    Args:
        blank: The site.
        random: Whether a fresh adapter shall act.
    """
    shape = (blank.slot.out_features, blank.r)
    return uniform(blank, shape)[:, 0].contiguous() if random else zeros(blank, shape[:1])
