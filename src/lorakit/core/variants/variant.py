"""The entries of the table VARIANTS, the factors that they act on, and what they are given.

Every variant returns an *addition* to the base output and to the base weight, so that several adapters, and batches
whose rows use different ones, are well defined in any order. An entry sees tensors and the geometry of a kind; it knows
nothing of adapters' names, routes or files. A hook that is None costs a forward nothing but that question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind, Shape, WeightSpec
from lorakit.core.linalg import Product, Reading

Setting = Mapping[str, "str | int | float | bool"]
"""What a config asks of a variant at one site."""

NO_SETTING: Setting = MappingProxyType({})
NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(eq=False)  # not frozen: each forward makes one, and the fields of a frozen one are set slowly
class Factor:
    """One adapter at one site, as arithmetic sees it.

    Attributes:
        A: Down projection, (r, in).
        B: Up projection, (out, r).
        scale: alpha / r, or alpha / √r for rsLoRA.
        dropout: What the input passes before A.
        variant: The entry of VARIANTS.
        own: The variant's own tensors by `OwnTensor.held_as`, each in its shape there.
        bias: Bias of B, (out,), scaled like the rest (`lora_bias`), or None.
        setting: What the config asks of the variant here.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: nn.Module
    variant: Variant
    own: Mapping[str, Tensor] = dataclasses.field(default_factory=lambda: NO_TENSORS)
    bias: Tensor | None = None
    setting: Setting = dataclasses.field(default_factory=lambda: NO_SETTING)

    def multiplied(self, training: bool = False) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) as they are multiplied.

        Args:
            training: The variant may perturb them, as in training.
        """
        return (self.A, self.B) if self.variant.factors is None else self.variant.factors(self, training)

    def plain(self, training: bool = False) -> Factor:
        """Return the factor with A (r, in) and B (out, r) as they are multiplied.

        Args:
            training: The variant may perturb them, as in training.
        """
        if self.variant.factors is None:
            return self
        A, B = self.variant.factors(self, training)
        return dataclasses.replace(self, A=A, B=B)


@dataclass(frozen=True)
class Start:
    """A new factor at its site, from which the own tensors of its variant are initialized.

    Attributes:
        kind: The kind of the site.
        slot: Its geometry.
        A: Initial down projection, (r, in).
        B: Initial up projection, (out, r).
        scale: The factor's scale.
        read: Reads the canonical base weight as the adapter sees it, (out, in) or as the kind says.
        path: The site, for messages.
        setting: What the config asks of the variant here.
        generator: Source of randomness, or None for torch's own.
    """

    kind: Kind
    slot: WeightSpec
    A: Tensor
    B: Tensor
    scale: float
    read: Callable[[], Tensor]
    path: str = ""
    setting: Setting = dataclasses.field(default_factory=lambda: NO_SETTING)
    generator: torch.Generator | None = None

    @property
    def rank(self) -> int:
        """The rank of A."""
        return self.kind.rank(self.slot, tuple(self.A.shape))


@dataclass(frozen=True)
class OwnTensor:
    """A tensor that a variant has for each adapter and site, in addition to A and B.

    Attributes:
        held_as: Attribute of the layer that holds it by adapter.
        carried: Whether that holds modules with a `.weight`, or the parameters themselves.
        keys: Endings of its names on disk: the first is written, all are read.
        shape: Kind, slot, rank, setting -> its shape in memory and on disk.
        start: New factor -> the initial tensor, in any shape with as many elements.
        trained: Whether training changes it.
        depends_on_rank: Whether another rank needs another tensor, so that a compressed adapter cannot keep it.
    """

    held_as: str
    carried: Literal["module", "parameter"]
    keys: tuple[str, ...]
    shape: Callable[[Kind, WeightSpec, int, Setting], Shape]
    start: Callable[[Start], Tensor]
    trained: bool = True
    depends_on_rank: bool = True


@dataclass(eq=False)  # not frozen, as `Factor`
class At:
    """One factor in one forward.

    Attributes:
        y0: The base's output, (…, out); of a convolution (N, out, …).
        bias: The bias in it, (out,), or None.
        z: The scaled low-rank output s·B(A x), like y0.
        factor: The factor.
        kind: The kind of the site.
        slot: Its geometry.
        read: Reads the canonical base weight, (out, in) or as the kind says.
        mask: z -> where the adapter acts, shaped to multiply it, for variants with `positions`; None where that is not
            known.
        x: The input as A takes it, (…, in), or None where a test gives none.
        siblings: Gives the factors of the site's other adapters, in the order they came.
    """

    y0: Tensor
    bias: Tensor | None
    z: Tensor
    factor: Factor
    kind: Kind
    slot: WeightSpec
    read: Callable[[], Tensor]
    mask: Callable[[Tensor], Tensor] | None = None
    x: Tensor | None = None
    siblings: Callable[[], Sequence[Factor]] = tuple


@dataclass(frozen=True)
class Addend:
    """One adapter's part in a sum of updates at one site.

    Attributes:
        factor: The adapter's factor there.
        weight: The number that its update is multiplied by.
        product: Its A and B as they are multiplied, as matrices (g, r, in) and (g, out, r), without the scale.
        experts: The number of matrices that share A and B; 1 where it is one.
    """

    factor: Factor
    weight: float
    product: Product
    experts: int = 1


@dataclass(frozen=True)
class Sum:
    """A sum of updates, of which the low-rank part is added up by whoever asked for it.

    Attributes:
        products: Of each addend the product whose weighted sum, each times its scale, is that part, (g, r, in) and
            (g, out, r).
        finish: That sum, at scale 1 -> the product to hold and the variant's own tensors by `OwnTensor.held_as`.
    """

    products: tuple[Product, ...]
    finish: Callable[[Product], tuple[Product, Mapping[str, Tensor]]]


def added(kind: Kind, slot: WeightSpec, W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    """Return the delta, like W (out, in), as the whole addition to the weight."""
    return delta


@dataclass(frozen=True, eq=False)
class Variant:
    """One way in which A, B and the base combine.

    Attributes:
        name: What layers and tests call it.
        title: What messages call it.
        field: The config's field that asks for it, "" for LoRA itself.
        setting: Config, path of a site -> what it asks for there, or None where it does not ask for the variant.
        fits: Kind -> whether the variant works on it. One that is not `every_kind` fits no kind that a user made.
        tensors: Its tensors in addition to A and B.
        shapes: Kind, slot, rank, setting -> shapes of A and B; None for the kind's own.
        factors: Factor, training -> A and B as they are multiplied; None for A and B as they are held.
        down: Kind, module, input, factor -> what B is applied to, unscaled; None for the kind's A·x.
        output: Where it is in a forward -> addition to y₀, like y₀; None for z.
        update: Kind, slot, canonical W, scaled delta like W, factor -> addition to W; None where it has no place there.
        unmergeable_reason: Why it has none, as the end of a sentence.
        positions: Token ids (rows, length), config, which tokens are visible (rows, length) or None -> on how many of
            the last positions of each row the adapter acts, (rows,) int64, 0 for none; None where it acts on all.
        span: Config -> number of tokens that decide a position, for variants with `positions`.
        move: New factor -> the canonical weight that replaces the base weight while the adapter is attached. It depends
            only on the base and the rank, so that adapters of the same rank share it.
        excludes_others: Why the model cannot have adapters of other variants, as the end of a sentence; "" if it can.
        penalty: Factor -> what it adds to the loss in training, a scalar.
        combine: Path, addends, base -> their sum as one factor of this variant; None where the sum is plain LoRA.
        must_agree: What adapters with other values of `field` do, as the end of a sentence; such adapters cannot be
            combined, and a combination keeps the value. "" where a combination need not have it.
        peft_names: PEFT's name of a table by adapter on its layers -> value for a factor; False for other variants.
        is_lora: It is LoRA with other numbers at most: kept stacks and fused operations take it.
        is_held_as_lora: It holds nothing but A and B, in the kind's own shapes.
    """

    name: str
    title: str
    field: str
    setting: Callable[[LoraConfig, str], Setting | None]
    fits: Callable[[Kind], bool]
    tensors: tuple[OwnTensor, ...] = ()
    shapes: Callable[[Kind, WeightSpec, int, Setting], tuple[Shape, Shape]] | None = None
    factors: Callable[[Factor, bool], tuple[Tensor, Tensor]] | None = None
    down: Callable[[Kind, nn.Module, Tensor, Factor], Tensor] | None = None
    output: Callable[[At], Tensor] | None = None
    update: Callable[[Kind, WeightSpec, Tensor, Tensor, Factor], Tensor] | None = added
    unmergeable_reason: str = ""
    positions: Callable[[Tensor, LoraConfig, Tensor | None], Tensor] | None = None
    span: Callable[[LoraConfig], int] | None = None
    move: Callable[[Start], Tensor] | None = None
    excludes_others: str = ""
    penalty: Callable[[Factor], Tensor] | None = None
    combine: Callable[[str, Sequence[Addend], Reading], Sum] | None = None
    must_agree: str = ""
    peft_names: Mapping[str, Callable[[Factor], object]] = dataclasses.field(default_factory=dict)
    is_lora: bool = dataclasses.field(init=False)
    is_held_as_lora: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        held = not self.tensors and self.shapes is None
        alone = self.factors is None and self.down is None and self.output is None
        object.__setattr__(self, "is_held_as_lora", held)
        object.__setattr__(self, "is_lora", held and alone)

    @property
    def outlasts_a_cut(self) -> bool:
        """Whether A and B of another rank are still of this variant; otherwise what is left is plain LoRA."""
        return self.factors is None and not any(tensor.depends_on_rank for tensor in self.tensors)

    @property
    def is_lora_once_multiplied(self) -> bool:
        """The factors are stored in other shapes than LoRA's, but are plain LoRA once `factors` is applied."""
        return self.shapes is not None and self.factors is not None and self.down is None and self.is_low_rank

    @property
    def is_mergeable(self) -> bool:
        """Whether its effect can be written into the weight."""
        return self.update is not None

    @property
    def is_low_rank(self) -> bool:
        """Whether what it does is B·A, wherever it acts."""
        return self.update is None or self.update is added

    def shapes_of(self, kind: Kind, slot: WeightSpec, r: int, setting: Setting = NO_SETTING) -> tuple[Shape, Shape]:
        """Return the shapes of A and B at a site, (r, in) and (out, r) on a dense one.

        On a kind that the variant does not fit they are LoRA's; `variant_for` rejects it by name.

        Args:
            kind: The kind of the site.
            slot: Its geometry.
            r: The rank.
            setting: What the config asks of the variant there.

        Raises:
            ConfigError: The rank does not fit.
        """
        if self.shapes is None or not self.fits(kind):
            return kind.shapes(slot, r)
        return self.shapes(kind, slot, r, setting)

    def starts(self, start: Start) -> dict[str, Tensor]:
        """Return the variant's own tensors of a new factor by `OwnTensor.held_as`, each in its shape there."""
        shaped = ((t, t.shape(start.kind, start.slot, start.rank, start.setting)) for t in self.tensors)
        return {tensor.held_as: tensor.start(start).reshape(shape) for tensor, shape in shaped}
