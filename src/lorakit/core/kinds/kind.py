"""`Kind`, an entry in KINDS, `WeightSpec`, the geometry of one weight, and the kinds for dense sites.

A kind does not handle scales, dropout, adapters or the storage of the base weight. Dense sites, which are nn.Linear,
transformers' Conv1D and nn.Embedding, have a single weight matrix. An embedding's weight is (V, d) in memory and (d, V)
in canonical orientation. Input indices are equivalent to one-hot rows, so A (r, V) is applied by a lookup of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import MergeError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightSpec:
    """The geometry of one weight of a module.

    Attributes:
        out_features: Number of rows of the canonical weight.
        in_features: Number of columns of the canonical weight; for a convolution, the total number of input channels.
        experts: Number of matrices in a parameter of shape (experts, …, …); 0 if the parameter is a single matrix.
        in_first: Whether each expert's matrix is stored as (in, out).
        kernel: Kernel size of a convolution; () for other modules.
        groups: Number of groups of a convolution; 1 for other modules.
        bounded: Whether an embedding limits the norm of the rows that it looks up (`max_norm`).
        as_stored: Whether the parameter itself is the canonical weight, even if the module stores weights as
            (in, out).
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
        name: Unique name, which appears in messages and selects the layer class.
        types: Module types, or their dotted names, to be matched along the MRO.
        acts_on: "input": B·A is applied to the module's input; "weight": B·A is added to the weight for one forward
            pass.
        zero_side: "A" or "B": the factor that is zero in a new adapter, so that the adapter has no effect yet.
        names: Layer attributes that hold A and B; also the names of A and B on disk.
        on_disk: Suffix of these names on disk.
        drops: Whether dropout can be applied to the input; it cannot if the input holds indices.
        specs: Module -> specs of the weights to adapt. If there are several, their layers are nested, and the first
            spec belongs to the outermost layer.
        inner: Names of child modules that become sites along with the module, because the module reads their weights.
        row_axis: Module -> the input axis that holds the batch rows, or None if unknown. Different rows can use
            different adapters only if the kind acts on the input.
        shapes: Spec and rank -> shapes of A and B; raises ConfigError for an invalid rank.
        rank: Spec and shape of A -> rank.
        vector: Spec -> shape of a vector with one value per output, such as (out,), in memory and on disk.
        down: Applies A to the input.
        up: Applies B to the result of `down`.
        flat: Spec, A and B -> A and B as matrices, (r, n) and (out, r); if the weight is a single matrix, B·A is the
            delta.
        flat_weight: Spec and canonical weight -> the weight as a matrix, (out, n).
        delta: Spec, A and B -> the unscaled delta in the canonical weight's shape; raises MergeError if the
            weight cannot hold the delta.
        shown_as: Name in messages, if it differs from the unique name.
        layer: Layer class of a user-defined kind; None for the entries in KINDS.
        is_dense: Whether the module is a dense layer, which multiplies its input by the weight exactly once.
            `"all-linear"` selects dense layers.
        names_parameter: Whether the site is a bare parameter, selected by its path (`target_parameters`).
        read_by_owner: Whether the parent module reads the module's weight instead of calling the module.
            `"all-linear"` selects such modules, too.
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
    shown_as: str = ""
    layer: type[nn.Module] | None = None
    is_dense: bool = False
    names_parameter: bool = False
    read_by_owner: bool = False


Fits = Callable[[Kind], bool]
"""A function that returns whether an entry in INITS or VARIANTS supports a kind."""


def every_kind(kind: Kind) -> bool:
    """Return True for every kind, including user-defined ones."""
    return True


def every_kind_of_the_table(kind: Kind) -> bool:
    """Return True for every entry in KINDS; the weights of all these kinds consist of one or more matrices."""
    return True


def only_linear(kind: Kind) -> bool:
    """Return whether the kind covers nn.Linear, quantized or not; the kind for transformers' Conv1D does not."""
    return nn.Linear in kind.types


def only_dense(kind: Kind) -> bool:
    """Return whether the kind multiplies its input with a matrix, as nn.Linear and transformers' Conv1D do."""
    return kind.is_dense


def takes_input(kind: Kind) -> bool:
    """Return whether the kind applies B·A to the module's input."""
    return kind.acts_on == "input"


def takes_values(kind: Kind) -> bool:
    """Return whether the kind applies B·A to the module's input, and the input holds values, not indices."""
    return takes_input(kind) and kind.drops


def spread(vector: Tensor, spec: WeightSpec) -> Tensor:
    """Reshape a vector (out,) to broadcast over an output (…, out), or (…, out, k…) for a convolution."""
    return vector.view(-1, *[1] * len(spec.kernel)) if spec.kernel else vector


def first_axis(_: nn.Module) -> int | None:
    """Return 0, because the first axis of the input holds the batch rows."""
    return 0


def dense_delta(A: Tensor, B: Tensor) -> Tensor:
    """Return the weight update B·A (out, in) of a dense site, without a scale.   [docs/math.md (1)]

    A is (r, in) and B (out, r). It takes 2·out·r·in FLOPs and out·in elements of memory. Source: Hu et al. 2021,
    arXiv:2106.09685, eq. (3).
    """
    return B @ A


class HasWeight(Protocol):
    """A module with one weight."""

    weight: Tensor


def factor_shapes(spec: WeightSpec, r: int) -> tuple[Shape, Shape]:
    """Return the shapes of A (r, in) and B (out, r)."""
    return (r, spec.in_features), (spec.out_features, r)


def as_they_are(_: WeightSpec, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) unchanged, because they are already matrices."""
    return A, B


def matrix(_: WeightSpec, W: Tensor) -> Tensor:
    """Return a canonical weight (out, in) unchanged, because it is already a matrix."""
    return W


def product(_: WeightSpec, A: Tensor, B: Tensor) -> Tensor:
    """Return the delta B·A (out, in), computed from A (r, in) and B (out, r)."""
    return dense_delta(A, B)


def linear_down(_: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    """Apply A (r, in) to x (…, in); the result has shape (…, r)."""
    return F.linear(x, A)


def linear_up(_: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    """Apply B (out, r) to h (…, r); the result has shape (…, out)."""
    return F.linear(h, B)


def axis_of_rows(_: WeightSpec, shape: Shape) -> int:
    """Return the rank: the size of A's first axis, or 0 if the shape is empty."""
    return shape[0] if shape else 0


def flat_vector(spec: WeightSpec) -> Shape:
    """Return the shape (out,) of a vector with one value per output."""
    return (spec.out_features,)


def _linear_specs(module: nn.Linear) -> tuple[WeightSpec, ...]:
    return (WeightSpec("weight", module.out_features, module.in_features),)  # a quantized weight's shape may differ


def _transposed_specs(module: HasWeight) -> tuple[WeightSpec, ...]:
    in_features, out_features = module.weight.shape
    return (WeightSpec("weight", out_features, in_features),)


LINEAR = Kind(
    name="Linear",
    types=(nn.Linear, "hqq.core.quantize.HQQLinear", "lorakit.core.quantization.packed.PackedLinear"),
    acts_on="input",
    zero_side="B",
    names=("lora_A", "lora_B"),
    on_disk=".weight",
    drops=True,
    specs=_linear_specs,
    inner=(),
    row_axis=first_axis,
    shapes=factor_shapes,
    rank=axis_of_rows,
    vector=flat_vector,
    down=linear_down,
    up=linear_up,
    flat=as_they_are,
    flat_weight=matrix,
    delta=product,
    is_dense=True,
)

CONV1D = replace(LINEAR, name="Conv1D", types=("transformers.pytorch_utils.Conv1D",), specs=_transposed_specs)


def _table_specs(module: nn.Embedding) -> tuple[WeightSpec, ...]:
    rows, width = module.weight.shape
    return (WeightSpec("weight", width, rows, bounded=module.max_norm is not None),)


def _table_delta(spec: WeightSpec, A: Tensor, B: Tensor) -> Tensor:
    """Return the delta B·A (d, V), computed from A (r, V) and B (d, r), if no max_norm would scale the sum down."""
    if spec.bounded:
        text = "An embedding with max_norm rescales the rows that it looks up, also merged ones; keep it unmerged."
        raise MergeError(text, field="max_norm")
    return dense_delta(A, B)


def _embedding_down(module: nn.Embedding, indices: Tensor, A: Tensor) -> Tensor:
    return F.embedding(
        indices,
        A.T,  # (V, r)
        padding_idx=module.padding_idx,
        scale_grad_by_freq=module.scale_grad_by_freq,
    )  # not `sparse`: A is small, and torch cannot transpose a sparse gradient (so PEFT's backward pass fails)


def _embedding_up(module: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    z = F.linear(h, B)  # (..., r) -> (..., d).
    embed_scale = getattr(module, "embed_scale", None)  # Some embeddings scale their output.
    return z if embed_scale is None else z * torch.as_tensor(embed_scale, dtype=z.dtype, device=z.device)


EMBEDDING = replace(
    LINEAR,
    name="Embedding",
    types=(nn.Embedding,),
    zero_side="A",
    names=("lora_embedding_A", "lora_embedding_B"),
    on_disk="",
    drops=False,
    specs=_table_specs,
    delta=_table_delta,
    down=_embedding_down,
    up=_embedding_up,
    is_dense=False,
)
