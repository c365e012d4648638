"""`Variant`, the type of the entries in VARIANTS, with the types of its functions, and LoRA, the entry without any.

Every variant computes an *addition* to the base output and to the base weight, so that several adapters can be applied
in any order and the rows of a batch can use different adapters. It does not depend on adapter names, routes or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.factor import BOTH
from lorakit.core.kinds.kind import Kind, Shape, WeightSpec, every_kind
from lorakit.core.linalg import Product, Reading
from lorakit.errors import ConfigError

Setting = Mapping[str, "str | int | float | bool"]
"""A variant's settings at one site."""

Role = Literal["A", "B", "embedding", "vector", "whole"]
"""A site's A or B; an embedding's factor; a magnitude, bias or other vector; or any other matrix (saved modules)."""

NO_SETTING: Setting = MappingProxyType({})
NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(eq=False)  # not frozen: each forward pass creates an instance, and frozen dataclasses are slower to create
class Factor:
    """The tensors and settings of one adapter at one site.

    Attributes:
        A: Down projection, (r, in).
        B: Up projection, (out, r).
        scale: alpha / r, or alpha / √r for rsLoRA.
        own: The variant's extra tensors, in the shapes used by the layer, keyed by `OwnTensor.held_as`.
        bias: Bias of B (`lora_bias`), (out,), which is scaled like B·A; None if B has no bias.
        memory: Tensors that the variant keeps from one forward pass to the next; they are neither saved nor moved.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: nn.Module
    variant: Variant
    own: Mapping[str, Tensor] = dataclasses.field(default_factory=lambda: NO_TENSORS)
    bias: Tensor | None = None
    setting: Setting = dataclasses.field(default_factory=lambda: NO_SETTING)
    memory: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def multiplied(self, training: bool = False) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) from the variant's `factors` function, which may perturb them in training."""
        return (self.A, self.B) if self.variant.factors is None else self.variant.factors(self, training)

    def plain(self, training: bool = False) -> Factor:
        """Return this factor with A (r, in) and B (out, r) transformed by the variant's `factors` function."""
        A, B = self.multiplied(training)
        return self if self.variant.factors is None else dataclasses.replace(self, A=A, B=B)


@dataclass(frozen=True)
class Start:
    """A new factor and its site, from which the variant's extra tensors are initialized.

    Attributes:
        A: Initial down projection, (r, in).
        B: Initial up projection, (out, r).
        read: Function that returns the canonical base weight that the adapter uses: (out, in), or the shape that the
            kind defines.
    """

    kind: Kind
    spec: WeightSpec
    A: Tensor
    B: Tensor
    scale: float
    read: Callable[[], Tensor]
    path: str = ""
    setting: Setting = dataclasses.field(default_factory=lambda: NO_SETTING)
    generator: torch.Generator | None = None

    @property
    def rank(self) -> int:
        """Rank of the new factor."""
        return self.kind.rank(self.spec, tuple(self.A.shape))

    def check_rank(self, most: int, title: str) -> None:
        """Raise a ConfigError if the rank exceeds the number of singular values of the base weight that can be used."""
        if self.rank > most:
            text = f"{self.path}: {title} requires `r` <= {most} for this base weight, but r is {self.rank}; lower r."
            raise ConfigError(text, what=self.rank, where=self.path, field="r")

    def finite_weight(self) -> Tensor:
        """Return the canonical base weight, (out, in) at a dense site; a ConfigError if it is not finite."""
        W = self.read().detach()
        if W.device.type != "meta" and not bool(torch.isfinite(W).all()):
            text = f"{self.path}: the base weight contains NaN or infinite values and cannot be decomposed."
            raise ConfigError(text, where=self.path)
        return W


def values_of(field: str) -> Callable[[LoraConfig, str], Setting | None]:
    """Return a `Variant.setting` with the values of a config's nested config, the same at every site."""

    def setting(config: LoraConfig, path: str) -> Setting | None:
        nested = getattr(config, field)
        return None if nested is None else dataclasses.asdict(nested)

    return setting


@dataclass(frozen=True)
class OwnTensor:
    """A tensor that a variant stores for each adapter and site, in addition to A and B.

    Attributes:
        held_as: Name of the layer attribute that holds this tensor for every adapter. If it contains a dot, the
            attribute before the dot holds one module per adapter, in which the tensor has the name after the dot. It is
            also the tensor's name on disk.
        carried: "module" if the attribute holds modules with a `.weight`, "parameter" if it holds parameters, or
            "buffer" if it holds buffers, which are saved but never trained.
        shape: Function from kind, weight spec, rank and setting to the tensor's shape in memory and on disk.
        start: Function from a `Start` to the initial tensor, which is then reshaped to `shape`.
        trained: Whether the tensor is trainable.
        depends_on_rank: Whether the tensor depends on the rank, so that a compressed adapter cannot keep the tensor.
        role: The tensor's role in an optimizer; a vector gets B's rate (LoRA+), and a whole matrix gets A's.
        older_names: Further names that are accepted in files.
    """

    held_as: str
    carried: Literal["module", "parameter", "buffer"]
    shape: Callable[[Kind, WeightSpec, int, Setting], Shape]
    start: Callable[[Start], Tensor]
    trained: bool = True
    depends_on_rank: bool = True
    role: Role = "vector"
    older_names: tuple[str, ...] = ()

    @property
    def container(self) -> str:
        """Name of the layer attribute with one entry per adapter."""
        return self.held_as.partition(".")[0]

    @property
    def member(self) -> str:
        """Name of the tensor in the module that is the adapter's entry; "" if the entry holds only this tensor."""
        return self.held_as.partition(".")[2]


@dataclass(frozen=True)
class Parts:
    """The tensors that a variant stores for each adapter and site, and how they are initialized and trained.

    Attributes:
        shapes: Function from kind, weight spec, rank and setting to the shapes of A and B; None for the kind's shapes.
        start: Function from a `Start`, which has the init's A and B, to the A and B that replace them; None if the init
            fills A and B. It may read the base weight.
        trains: Which of "A" and "B" are trainable; an init may freeze one more.
        holder: Function from "A" or "B", the parameter and the variant's settings to the module that holds the
            parameter, or to None for the usual module; None if the usual module holds both.
        extras: The tensors in addition to A and B.
        uses_factors: Whether the output depends on the factor's own A and B, so that zeros in them are suspicious.
    """

    shapes: Callable[[Kind, WeightSpec, int, Setting], tuple[Shape, Shape]] | None = None
    start: Callable[[Start], tuple[Tensor, Tensor]] | None = None
    trains: frozenset[str] = BOTH
    holder: Callable[[str, nn.Parameter, Setting], nn.Module | None] | None = None
    extras: tuple[OwnTensor, ...] = ()
    uses_factors: bool = True

    def factors(self, start: Start) -> tuple[Tensor, Tensor]:
        """Return the A (r, in) and B (out, r) of a new factor, given those of the init."""
        return (start.A, start.B) if self.start is None else self.start(start)

    def extra_tensors(self, start: Start) -> dict[str, Tensor]:
        """Return a new factor's extra tensors, shaped as `OwnTensor.shape` specifies, keyed by `OwnTensor.held_as`."""
        shaped = ((t, t.shape(start.kind, start.spec, start.rank, start.setting)) for t in self.extras)
        return {tensor.held_as: tensor.start(start).reshape(shape) for tensor, shape in shaped}


@dataclass(eq=False)  # not frozen, for the same reason as `Factor`
class At:
    """The state of one factor during a forward pass.

    Attributes:
        y0: The base output, (…, out), or (N, out, …) for a convolution.
        bias: The bias that `y0` includes, (out,), or None.
        z: The scaled low-rank output s·B(A x), shaped like `y0`.
        read: Function that returns the canonical base weight: (out, in), or the shape that the kind defines.
        mask: For variants with `positions`, a function from z to a boolean mask of the active positions, broadcastable
            to z; None if the positions are unknown.
        x: The input to A, (…, in); None in tests that do not need it.
        siblings: Function that returns the factors of the site's other adapters, keyed by adapter, in the order in
            which they were added.
    """

    y0: Tensor
    bias: Tensor | None
    z: Tensor
    factor: Factor
    kind: Kind
    spec: WeightSpec
    read: Callable[[], Tensor]
    mask: Callable[[Tensor], Tensor] | None = None
    x: Tensor | None = None
    siblings: Callable[[], Mapping[str, Factor]] = dict


@dataclass(frozen=True)
class Addend:
    """One adapter's update in a sum of updates at one site.

    Attributes:
        product: Unscaled A (groups, r, in) and B (groups, out, r), as returned by the variant's `factors` function.
        experts: The number of experts, each with its own part of A and B; 1 for a single matrix.
    """

    factor: Factor
    weight: float
    product: Product
    experts: int = 1


@dataclass(frozen=True)
class Sum:
    """A sum of updates; the caller computes its low-rank part.

    Attributes:
        products: One product per addend, with A (groups, r, in) and B (groups, out, r). The low-rank part is the sum of
            the products, each multiplied by its addend's weight and scale.
        finish: Takes the low-rank part, with scale 1, and returns the product to store and the variant's extra
            tensors, keyed by `OwnTensor.held_as`.
    """

    products: tuple[Product, ...]
    finish: Callable[[Product], tuple[Product, Mapping[str, Tensor]]]


def added(kind: Kind, spec: WeightSpec, W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    """Return the delta (out, in) unchanged, because the delta is the complete change to the weight."""
    return delta


@dataclass(frozen=True)
class Move:
    """A weight that replaces the base weight.

    Attributes:
        weight: Function from a `Start` to the canonical weight. It depends only on the base and the rank, so adapters
            of the same rank share it.
        excludes_others: Why the model cannot have adapters of other variants at the same time, phrased as the end of a
            message; "" if other variants are allowed.
    """

    weight: Callable[[Start], Tensor]
    excludes_others: str = ""


@dataclass(frozen=True)
class Penalty:
    """A term that a variant adds to the training loss.

    Attributes:
        term: Function from a factor and a training flag to the factor's term, a scalar.
        is_mean: Whether the penalty of a model is the mean of the terms instead of their sum.
    """

    term: Callable[[Factor, bool], Tensor]
    is_mean: bool = False


@dataclass(frozen=True, eq=False)
class Variant:
    """A LoRA variant: one way to combine A, B and the base weight.

    Attributes:
        field: Config field that selects the variant; "" for LoRA itself.
        fits: Function that returns whether the variant supports a kind. Only the function `every_kind` accepts
            user-defined kinds.
        setting: Function from a config and a site's path to the variant's settings there, or to None if the site does
            not use the variant. For a variant without settings, the attribute is None.
        factors: Function from a factor and a training flag to the A and B to multiply; None to multiply A and B as
            stored.
        down: Function from kind, module, input, factor and a training flag to the unscaled input of B; None for the
            kind's A·x. It may write to the factor's buffers and memory.
        output: Function from an `At` to the addition to y₀, shaped like y₀; None if the addition is z. It may write to
            the factor's memory.
        update: Function from kind, weight spec, canonical W, scaled delta (shaped like W) and factor to the addition to
            W; or why the variant is not mergeable, phrased as the end of a message.
        invocation: Function from a config to the ids of the tokens, in order, from whose last occurrence the adapter is
            active; None if the adapter is always active.
        move: The weight that replaces the base weight while the adapter is attached; None if the base is unchanged.
        combine: Function that takes a site's path, addends and base weight, and returns the sum as one factor of this
            variant; None if the sum is plain LoRA; or why adapters with different values of `field` cannot be combined,
            such as "have different invocation tokens": if the values are equal, the result has the same value.
        unclear: What files without a fingerprint of the base, such as PEFT's, do not say about A and B, and what to do;
            "" if nothing.
    """

    name: str
    title: str
    field: str
    fits: Callable[[Kind], bool]
    setting: Callable[[LoraConfig, str], Setting | None] | None = None
    parts: Parts = Parts()
    factors: Callable[[Factor, bool], tuple[Tensor, Tensor]] | None = None
    down: Callable[[Kind, nn.Module, Tensor, Factor, bool], Tensor] | None = None
    output: Callable[[At], Tensor] | None = None
    update: Callable[[Kind, WeightSpec, Tensor, Tensor, Factor], Tensor] | str = added
    invocation: Callable[[LoraConfig], Sequence[int]] | None = None
    move: Move | None = None
    penalty: Penalty | None = None
    combine: Callable[[str, Sequence[Addend], Reading], Sum] | str | None = None
    unclear: str = ""

    @cached_property  # read in each forward pass
    def is_held_as_lora(self) -> bool:
        """True if the variant stores only A and B, in the kind's shapes."""
        return not self.parts.extras and self.parts.shapes is None

    @cached_property
    def is_lora(self) -> bool:
        """True if only the scale may differ from LoRA's, so that stacked adapters and fused operations support it."""
        return self.is_held_as_lora and self.factors is None and self.down is None and self.output is None

    @property
    def outlasts_a_cut(self) -> bool:
        """True if a truncated adapter keeps the variant; False if truncation turns it into plain LoRA."""
        return self.factors is None and not any(tensor.depends_on_rank for tensor in self.parts.extras)

    @property
    def is_lora_once_multiplied(self) -> bool:
        """True if A and B are stored in shapes other than LoRA's, but `factors` turns them into plain LoRA factors."""
        return self.parts.shapes is not None and self.factors is not None and self.down is None and self.is_low_rank

    @property
    def is_mergeable(self) -> bool:
        """True if the update can be merged into the weight."""
        return not isinstance(self.update, str)

    @property
    def adds_product(self) -> bool:
        """True if the update of a new factor is s·B·A, so that an init may subtract it from the base weight."""
        return self.factors is None

    @property
    def is_low_rank(self) -> bool:
        """True if the update is B·A wherever the adapter is active."""
        return not self.is_mergeable or self.update is added

    def shapes_of(self, kind: Kind, spec: WeightSpec, r: int, setting: Setting, path: str) -> tuple[Shape, Shape]:
        """Return the shapes of A and B at a site: (r, in) and (out, r) at a dense site; a ConfigError if that is not
        possible.

        If the variant does not support the kind, LoRA's shapes are returned; `variant_for` rejects such a site.
        """
        if self.parts.shapes is None or not self.fits(kind):
            try:
                return kind.shapes(spec, r)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}", **{**error.fields, "where": path}) from error
        return self.parts.shapes(kind, spec, r, setting)


PLAIN = Variant(name="plain", title="LoRA", field="", fits=every_kind)
"""LoRA, and rsLoRA, which differs only in the scale: h = W x + s·B(A x), so W gets s·B·A.   [docs/math.md (2)]

Source: Hu et al. 2021, arXiv:2106.09685, eq. (3).
"""
