"""Kinds for dense sites: nn.Linear, transformers' Conv1D, and nn.Embedding.

Each of these modules has a single weight matrix. An embedding's weight is (V, d) in memory and (d, V) in canonical
orientation. Input indices are equivalent to one-hot rows, so A (r, V) is applied by looking up its columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.kinds.kind import Kind, Shape, WeightSpec, dense_delta, first_axis
from lorakit.errors import MergeError


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
        raise MergeError(
            "An embedding with max_norm rescales the rows that it looks up; with a merged adapter, it would rescale "
            "the sum of each row and its update. Keep the adapter unmerged, or remove max_norm.",
            field="max_norm",
        )
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
