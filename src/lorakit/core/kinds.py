"""The table KINDS: for each type of module, how A and B act on it and what shape their product has.

A kind answers for the geometry of LoRA at one type of module: which weights it holds (slots), the shapes of A
and B, the two half-products, and the dense delta in canonical orientation (out, in). It knows nothing about
scales, dropout, adapters or how the base weight is stored. Types that are not installed are named by
dotted string and looked up along the MRO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One weight of one site: the geometry that a kind works with.

    Attributes:
        parameter: Name of the parameter in the module.
        infix: What stands between the site's path and `lora_A` on disk, "" for a module's own weight.
        out_features: Rows of the canonical weight.
        in_features: Columns of the canonical weight.
    """

    parameter: str
    infix: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Kind:
    """How LoRA sits on one type of module.

    Attributes:
        name: What users call it; `LoraLayer` subclasses bear it.
        types: Module types, or their dotted names.
        acts_on: "input": B·A runs beside the module; "weight": it is added to the weight for one forward.
        zero_side: Which of A, B is zero in a fresh adapter, so that it changes nothing.
        names: Attributes of the layer that hold A and B, also their names on disk.
        on_disk: What follows the attribute's name on disk.
        drops: Whether the input can be dropped elementwise (not where it holds indices).
        slots: The weights of a module that can be adapted.
        row_axis: Which axis of the input holds the rows of the batch, or None where a mixed batch has no meaning.
        shapes: Shapes of A and B for a slot and a rank.
        down: First half-product, A applied to the input.
        up: Second half-product, B applied to the first.
    """

    name: str
    types: tuple[type[nn.Module] | str, ...]
    acts_on: str
    zero_side: str
    names: tuple[str, str]
    on_disk: str
    drops: bool
    slots: Callable[[nn.Module], tuple[Slot, ...]]
    row_axis: Callable[[nn.Module], int | None]
    shapes: Callable[[Slot, int], tuple[Shape, Shape]]
    down: Callable[[nn.Module, Tensor, Tensor], Tensor]
    up: Callable[[nn.Module, Tensor, Tensor], Tensor]


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


def _first_axis(_: nn.Module) -> int | None:
    return 0


def _factor_shapes(slot: Slot, r: int) -> tuple[Shape, Shape]:
    return (r, slot.in_features), (slot.out_features, r)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _linear_slots(module: nn.Module) -> tuple[Slot, ...]:
    out_features, in_features = _weight(module).shape
    return (Slot("weight", "", out_features, in_features),)


def _transposed_slots(module: nn.Module) -> tuple[Slot, ...]:
    in_features, out_features = _weight(module).shape
    return (Slot("weight", "", out_features, in_features),)


def _linear_down(_: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    return F.linear(x, A)  # (..., in) -> (..., r)


def _linear_up(_: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    return F.linear(h, B)  # (..., r) -> (..., out)


def _embedding_down(module: Any, indices: Tensor, A: Tensor) -> Tensor:
    return F.embedding(
        indices,
        A.T,  # (V, r)
        padding_idx=module.padding_idx,
        max_norm=module.max_norm,
        norm_type=module.norm_type,
        scale_grad_by_freq=module.scale_grad_by_freq,
        sparse=module.sparse,
    )


def _embedding_up(module: Any, h: Tensor, B: Tensor) -> Tensor:
    z = F.linear(h, B)  # (..., r) -> (..., d)
    embed_scale = getattr(module, "embed_scale", None)  # scaled embeddings multiply what they look up
    return z if embed_scale is None else z * torch.as_tensor(embed_scale, dtype=z.dtype, device=z.device)


_LINEAR = Kind(
    name="Linear",
    types=(nn.Linear,),
    acts_on="input",
    zero_side="B",
    names=("lora_A", "lora_B"),
    on_disk=".weight",
    drops=True,
    slots=_linear_slots,
    row_axis=_first_axis,
    shapes=_factor_shapes,
    down=_linear_down,
    up=_linear_up,
)

KINDS: tuple[Kind, ...] = (
    _LINEAR,
    replace(_LINEAR, name="Conv1D", types=("transformers.pytorch_utils.Conv1D",), slots=_transposed_slots),
    Kind(
        name="Embedding",
        types=(nn.Embedding,),
        acts_on="input",
        zero_side="A",
        names=("lora_embedding_A", "lora_embedding_B"),
        on_disk="",
        drops=False,
        slots=_transposed_slots,
        row_axis=_first_axis,
        shapes=_factor_shapes,
        down=_embedding_down,
        up=_embedding_up,
    ),
)


_NAMED = {kind.name: kind for kind in KINDS}

READ_BY_THEIR_OWNER = frozenset({"torch.nn.modules.linear.NonDynamicallyQuantizableLinear"})
"""Dense layers whose weight another module reads without calling them: factors beside them would do nothing."""


def kind_of(module_type: type[nn.Module]) -> Kind | None:
    """The kind of site that a type of module can be, or None; the nearest ancestor in a row decides.

    Args:
        module_type: Class of a module of the base.
    """
    for ancestor in module_type.__mro__:
        dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if dotted in READ_BY_THEIR_OWNER:
            return None
        for kind in KINDS:
            if ancestor in kind.types or dotted in kind.types:
                return kind
    return None


def kind_named(name: str) -> Kind:
    """The kind with that name; names are the table's own, so a miss is a mistake in lorakit."""
    return _NAMED[name]
