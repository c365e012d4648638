"""Rows of a batch laid end to end without padding, each seeing only itself, for models that a probe shows to obey."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.cross_entropy import IGNORED
from lorakit.speed.probing import TOLERANCES, at_rest, token_ids


def end_to_end(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """One row of all tokens of a batch that are no padding.

    Args:
        input_ids: (rows, length), padded on one side.
        attention_mask: 1 for a token, 0 for padding, (rows, length).
        labels: (rows, length).

    Returns:
        The model's arguments, `input_ids` (1, tokens) and what says where each sequence begins, and labels (1, tokens);
        the first token of a sequence is never predicted, since what stands before it is another's.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(1)
    lengths = lengths[lengths > 0]
    boundaries = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    tokens, wanted = input_ids[kept][None], labels[kept].clone()[None]
    wanted[0, boundaries[:-1].long()] = IGNORED
    positions = torch.cat([torch.arange(int(n), device=input_ids.device) for n in lengths])[None]
    longest = int(lengths.max())
    where = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": tokens, "position_ids": positions, **where}, wanted


def obeys(model: Any) -> bool:
    """Whether a model gives two sequences laid end to end what it gives each alone.

    Args:
        model: A causal transformers model, accelerated.
    """
    ids = token_ids(model)
    long, short = ids[:1], ids[1:, : ids.shape[1] // 2]
    mask = torch.ones_like(ids)
    mask[1, short.shape[1] :] = 0
    inputs, _ = end_to_end(ids, mask, ids)
    try:
        with at_rest(model), torch.inference_mode():  # which leaves no trace for a backward
            alone = [model(input_ids=one, use_cache=False).logits[0] for one in (long, short)]
            packed = model(**inputs, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it does not take such arguments
        return False
    wanted = torch.cat(alone).double()
    if wanted.shape != packed.shape:
        return False
    error = torch.linalg.vector_norm(packed.double() - wanted) / torch.linalg.vector_norm(wanted).clamp_min(1e-30)
    return float(error) <= TOLERANCES.get(packed.dtype, 0.0)
