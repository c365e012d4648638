"""Kind of nn.Embedding: A and B act on token ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.kinds.kind import WeightSpec, dense_delta
from lorakit.core.kinds.linear import LINEAR
from lorakit.errors import MergeError


def _table_slots(module: Any) -> tuple[WeightSpec, ...]:
    rows, width = module.weight.shape
    return (WeightSpec("weight", width, rows, bounded=module.max_norm is not None),)


def _table_delta(slot: WeightSpec, A: Tensor, B: Tensor) -> Tensor:
    """The delta (d, V) of A (r, V) and B (d, r).

    Raises:
        MergeError: The table shortens what it looks up, so a sum in it would be shortened as a whole.
    """
    if slot.bounded:
        raise MergeError(
            "An embedding with max_norm shortens the rows that it looks up; with an adapter in the table it would "
            "shorten their sum. Keep the adapter beside it, or take max_norm off."
        )
    return dense_delta(A, B)


def _embedding_down(module: Any, indices: Tensor, A: Tensor) -> Tensor:
    return F.embedding(
        indices,
        A.T,  # (V, r)
        padding_idx=module.padding_idx,
        scale_grad_by_freq=module.scale_grad_by_freq,
    )  # never sparse: a sparse gradient has no transpose in torch (peft's backward fails there), and A is small


def _embedding_up(module: Any, h: Tensor, B: Tensor) -> Tensor:
    z = F.linear(h, B)  # (..., r) -> (..., d)
    embed_scale = getattr(module, "embed_scale", None)  # scaled embeddings multiply what they look up
    return z if embed_scale is None else z * torch.as_tensor(embed_scale, dtype=z.dtype, device=z.device)


EMBEDDING = replace(
    LINEAR,
    name="Embedding",
    types=(nn.Embedding,),
    zero_side="A",
    names=("lora_embedding_A", "lora_embedding_B"),
    on_disk="",
    drops=False,
    slots=_table_slots,
    delta=_table_delta,
    down=_embedding_down,
    up=_embedding_up,
    is_dense=False,
)
