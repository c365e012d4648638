"""`Kind`, an entry of KINDS, and `WeightSpec`, the geometry of one weight.

A kind defines the geometry of LoRA on one type of module: which weights the module has, the shapes of A and B, how each
is applied, and the delta in canonical orientation, whose leading axis is the output. It knows nothing about scales,
dropout, adapters or how the base weight is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightSpec:
    """One weight of one module: the geometry that a kind works with.

    Attributes:
        parameter: Name of the parameter in the module.
        out_features: Rows of the canonical weight.
        in_features: Columns of the canonical weight; of a convolution, all its input channels.
        experts: Number of matrices in the parameter, (experts, …, …); 0 if it is one matrix.
        in_first: An expert's matrix is stored as (in, out).
        kernel: Size of a convolution's kernel, () for other modules.
        groups: Groups of a convolution.
        bounded: A lookup scales rows down to a maximum norm.
        as_stored: The canonical weight is the parameter itself, even in a module that stores (in, out).
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
    """The geometry of LoRA on one type of module.

    Attributes:
        name: Its name, which the subclass of `LoraLayer` has too.
        types: Module types, or their dotted names, which are looked up along the MRO.
        acts_on: "input": B·A is applied to the module's input; "weight": it is added to the weight for one forward.
        zero_side: "A" or "B": the one that is zero in a new adapter, so that the adapter changes nothing.
        names: Attributes of the layer that hold A and B, also their names on disk.
        on_disk: Suffix of the attribute's name on disk.
        drops: Whether dropout can be applied to the input, which it cannot if the input holds indices.
        specs: Module -> the specs of the weights to adapt, the outermost layer's first.
        inner: Children that become sites together with the module, because it reads their weight.
        row_axis: Module -> the axis of its input that holds the rows of the batch, or None if that is not known. Rows
            can have different adapters if the kind acts on the input.
        shapes: Weight and rank -> shapes of A and B; raises ConfigError if the rank does not fit.
        rank: Weight and shape of A -> its rank.
        vector: Weight -> shape of a vector over the outputs, (out,), in memory and on disk.
        down: Apply A to the input.
        up: Apply B to the result of `down`.
        flat: A and B of a weight as matrices, (r, n) and (out, r), so that the delta of one matrix is B·A.
        flat_weight: The canonical weight as a matrix, (out, n).
        delta: The unscaled delta in the shape of the canonical weight; raises MergeError if it has none.
        layer: Class of the layer, for kinds that users define; None for the entries of KINDS.
        is_dense: The module is a dense layer: "all-linear" includes it, and its output is one matmul with the input.
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
    specs: Callable[[Any], tuple[WeightSpec, ...]]
    inner: tuple[str, ...]
    row_axis: Callable[[nn.Module], int | None]
    shapes: Callable[[WeightSpec, int], tuple[Shape, Shape]]
    rank: Callable[[WeightSpec, Shape], int]
    vector: Callable[[WeightSpec], Shape]
    down: Callable[[Any, Tensor, Tensor], Tensor]
    up: Callable[[Any, Tensor, Tensor], Tensor]
    flat: Callable[[WeightSpec, Tensor, Tensor], tuple[Tensor, Tensor]]
    flat_weight: Callable[[WeightSpec, Tensor], Tensor]
    delta: Callable[[WeightSpec, Tensor, Tensor], Tensor]
    layer: type[nn.Module] | None = None
    is_dense: bool = False
    names_parameter: bool = False
    read_by_owner: bool = False

    @property
    def takes_bias(self) -> bool:
        """True if B can have a bias (`lora_bias`): it must produce an output, from an input of floats."""
        return takes_input(self) and self.drops


Fits = Callable[[Kind], bool]
"""Tells if an entry of INITS or VARIANTS supports a kind."""


def every_kind(kind: Kind) -> bool:
    """Support every kind, including those that users define."""
    return True


def every_kind_of_the_table(kind: Kind) -> bool:
    """Support every entry of KINDS, all of whose weights are one or several matrices."""
    return True


def only_linear(kind: Kind) -> bool:
    """Support nn.Linear and its quantized versions, not Conv1D."""
    return nn.Linear in kind.types


def takes_input(kind: Kind) -> bool:
    """Support kinds for which B·A is applied to the module's input."""
    return kind.acts_on == "input"


def spread(vector: Tensor, spec: WeightSpec) -> Tensor:
    """Return a vector (out,) in a shape that broadcasts over an output (…, out), or (…, out, k…) of a convolution."""
    return vector.view(-1, *[1] * len(spec.kernel)) if spec.kernel else vector


def first_axis(_: nn.Module) -> int | None:
    """Return 0: the first axis of the input holds the rows."""
    return 0


def dense_delta(A: Tensor, B: Tensor) -> Tensor:
    """Return the unscaled weight update B·A of a dense site.   [docs/math.md (1)]

    Args:
        A: Down projection, (r, in).
        B: Up projection, (out, r), same dtype and device as A.

    Returns:
        (out, in). Cost: 2·out·r·in FLOPs and out·in elements of memory.

    Source:
        Hu et al. 2021, arXiv:2106.09685, eq. (3).
    """
    return B @ A
