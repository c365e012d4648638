"""What a row of the table KINDS says, and the geometry it speaks of.

A kind answers for the geometry of LoRA at one type of module: which weights it holds (slots), the shapes of A
and B, the two half-products, and the delta in canonical orientation, its leading axis out. It knows nothing
about scales, dropout, adapters or how the base weight is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightSpec:
    """One weight of one module: the geometry that a kind works with.

    Attributes:
        parameter: Name of the parameter in the module.
        out_features: Rows of the canonical weight.
        in_features: Columns of the canonical weight; of a convolution, all its input channels.
        experts: So many matrices lie in one parameter, (experts, …, …); 0 where it is one matrix.
        in_first: An expert's matrix lies as (in, out).
        kernel: Size of a convolution's kernel, () elsewhere.
        groups: Groups of a convolution.
        bounded: Rows are shortened to a largest norm when they are looked up.
        as_stored: The canonical weight is the parameter as it lies, also in a module that stores (in, out).
    """

    parameter: str
    out_features: int
    in_features: int
    experts: int = 0
    in_first: bool = False
    kernel: Shape = ()
    groups: int = 1
    bounded: bool = False
    as_stored: bool = False


@dataclass(frozen=True)
class Kind:
    """How LoRA sits on one type of module.

    Attributes:
        name: What users call it; `LoraLayer` subclasses bear it.
        types: Module types, or their dotted names, which are looked up along the MRO.
        acts_on: "input": B·A runs beside the module; "weight": it is added to the weight for one forward.
        zero_side: Which of A, B is zero in a fresh adapter, so that it changes nothing.
        names: Attributes of the layer that hold A and B, also their names on disk.
        on_disk: What follows the attribute's name on disk.
        drops: Whether the input can be dropped elementwise (not where it holds indices).
        slots: The weights of a module that naming the module adapts, the outermost layer's first.
        inner: Children that get a site of their own together with the module, because it reads their weight.
        row_axis: Which axis of the input holds the rows of the batch, or None where that is not known. Rows can have
            different adapters where the kind acts on the input.
        shapes: Shapes of A and B for a slot and a rank; raises ConfigError where the rank does not fit.
        rank: WeightSpec, shape of A -> the rank it has.
        vector: Shape in which a vector over the outputs, (out,), lies in memory and on disk.
        down: First half-product, A applied to the input.
        up: Second half-product, B applied to the first.
        flat: A and B of a slot as matrices, (r, n) and (out, r), so that the delta of one matrix is their product.
        flat_weight: The canonical weight of a slot as a matrix, (out, n).
        delta: The unscaled delta of a slot in the shape of its canonical weight; raises MergeError where it has none.
        layer: Class of the layer that stands there, of a kind that a user made; None for the table's own.
        is_dense: The module is a dense layer, so "all-linear" means it and its products are one matrix with the input.
        names_parameter: The site is one bare parameter of a module, named by its own path (`target_parameters`).
        read_by_owner: The module's weight is read by the module around it, which does not call it.
    """

    name: str
    types: tuple[type[nn.Module] | str, ...]
    acts_on: str
    zero_side: str
    names: tuple[str, str]
    on_disk: str
    drops: bool
    slots: Callable[[nn.Module], tuple[WeightSpec, ...]]
    inner: tuple[str, ...]
    row_axis: Callable[[nn.Module], int | None]
    shapes: Callable[[WeightSpec, int], tuple[Shape, Shape]]
    rank: Callable[[WeightSpec, Shape], int]
    vector: Callable[[WeightSpec], Shape]
    down: Callable[[nn.Module, Tensor, Tensor], Tensor]
    up: Callable[[nn.Module, Tensor, Tensor], Tensor]
    flat: Callable[[WeightSpec, Tensor, Tensor], tuple[Tensor, Tensor]]
    flat_weight: Callable[[WeightSpec, Tensor], Tensor]
    delta: Callable[[WeightSpec, Tensor, Tensor], Tensor]
    layer: type[nn.Module] | None = None
    is_dense: bool = False
    names_parameter: bool = False
    read_by_owner: bool = False

    @property
    def takes_bias(self) -> bool:
        """Whether B can have a bias (`lora_bias`): where it makes an output of its own out of numbers."""
        return self.acts_on == "input" and self.drops


Fits = Callable[[Kind], bool]
"""Whether an entry of INITS or VARIANTS works on a kind."""


def every_kind(kind: Kind) -> bool:
    """Fit every kind, also those that users made."""
    return True


def every_kind_of_the_table(kind: Kind) -> bool:
    """Fit every entry of KINDS: their weights are matrices, or several side by side."""
    return True


def spread(vector: Tensor, slot: WeightSpec) -> Tensor:
    """A vector (out,) shaped to act on an output (…, out) or, of a convolution, (…, out, k…)."""
    return vector.view(-1, *[1] * len(slot.kernel)) if slot.kernel else vector


def first_axis(_: nn.Module) -> int | None:
    """Rows are the first axis of the input."""
    return 0


def dense_delta(A: Tensor, B: Tensor) -> Tensor:
    """The unscaled weight update B·A of a dense site.   [docs/math.md (1)]

    Args:
        A: Down projection, (r, in).
        B: Up projection, (out, r), same dtype and device as A.

    Returns:
        (out, in). Cost: 2·out·r·in FLOPs and out·in elements live.

    Source:
        Hu et al. 2021, arXiv:2106.09685, eq. (3).
    """
    return B @ A
