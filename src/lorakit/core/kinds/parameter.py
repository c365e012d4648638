"""Kinds whose update is added to a weight for one forward pass: bare parameters and nn.MultiheadAttention.

LoRA cannot access the inputs that these weights multiply, so B·A is added to the weight itself. If a parameter holds
several experts, their factors are stored together in PEFT's layout: A (experts·r, in), grouped by expert, and
B (out, r·experts), in which the expert index varies fastest.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit.core.kinds.kind import LINEAR, Shape, WeightSpec, dense_delta
from lorakit.errors import TargetError


def _no_axis(_: nn.Module) -> int | None:
    return None


def parameter_spec(module: nn.Module, name: str) -> WeightSpec:
    """Return the spec of a parameter (out, in) or (experts, out, in); raise a TargetError for other shapes."""
    shape = tuple(getattr(module, name).shape)
    if len(shape) == 2:
        return WeightSpec(name, *shape, as_stored=True)
    if len(shape) != 3:
        text = f"The parameter {name!r} has shape {shape}; LoRA requires a parameter with two or three axes."
        raise TargetError(text, what=name)
    in_first = bool(getattr(module, "is_transposed", False))  # how transformers marks experts stored as (in, out)
    experts, first, second = shape
    return WeightSpec(name, *((second, first) if in_first else (first, second)), experts, in_first, as_stored=True)


def _shapes(spec: WeightSpec, r: int) -> tuple[Shape, Shape]:
    wide = r * max(spec.experts, 1)
    return (wide, spec.in_features), (spec.out_features, wide)


def _rank(spec: WeightSpec, shape: Shape) -> int:
    return shape[0] // max(spec.experts, 1) if shape else 0


def _delta(spec: WeightSpec, A: Tensor, B: Tensor) -> Tensor:
    """Return B·A, from A (experts·r, in) and B (out, r·experts), in the parameter's shape.   [docs/math.md (92)]"""
    if not spec.experts:
        return dense_delta(A, B)
    A, B = per_expert(A, B, spec.experts)
    return torch.bmm(A.mT, B.mT) if spec.in_first else torch.bmm(B, A)


def per_expert(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Split A (experts·r, in) and B (out, r·experts) by expert, into (experts, r, in) and (experts, out, r)."""
    return split_A(A, experts), split_B(B, experts)


def split_A(A: Tensor, experts: int) -> Tensor:
    """Return the A (experts, r, in) of each expert of a parameter, given its A (experts·r, in)."""
    return A.unflatten(0, (experts, -1))


def split_B(B: Tensor, experts: int) -> Tensor:
    """Return the B (experts, out, r) of each expert of a parameter, given its B (out, r·experts)."""
    return B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def joined_A(A: Tensor) -> Tensor:
    """Return the A (experts·r, in) of a parameter from those of its experts, (experts, r, in)."""
    return A.flatten(0, 1)


def joined_B(B: Tensor) -> Tensor:
    """Return the B (out, r·experts) of a parameter from those of its experts, (experts, out, r)."""
    return B.permute(1, 2, 0).flatten(1)


def _attention_specs(module: nn.MultiheadAttention) -> tuple[WeightSpec, ...]:
    # A module has either one packed weight (the first name below) or three separate weights.
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return tuple(parameter_spec(module, name) for name in names if getattr(module, name) is not None)


def _attention_axis(module: nn.Module) -> int | None:
    first = getattr(module, "batch_first", None)  # None for attention modules that lack the attribute
    return None if first is None else 0 if first else 1


PARAMETER = replace(
    LINEAR,
    name="Parameter",
    types=(),  # selected by target_parameters, never by module type
    acts_on="weight",
    drops=False,
    row_axis=_no_axis,
    shapes=_shapes,
    rank=_rank,
    delta=_delta,
    is_dense=False,
    names_parameter=True,
)

ATTENTION = replace(
    PARAMETER,
    name="MultiheadAttention",
    types=(nn.MultiheadAttention,),
    row_axis=_attention_axis,
    names_parameter=False,
    specs=_attention_specs,
    inner=("out_proj",),
)

INNER = replace(
    PARAMETER,
    name="InnerLinear",
    types=("torch.nn.modules.linear.NonDynamicallyQuantizableLinear",),
    specs=LINEAR.specs,
    names_parameter=False,
    read_by_owner=True,
    shown_as=ATTENTION.name,
)
"""The output projection of nn.MultiheadAttention: a dense layer that is never called; only its weight is read.

It becomes a site together with the attention module, or alone if a config selects it by name or with "all-linear".
"""
