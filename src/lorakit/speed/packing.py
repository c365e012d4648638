"""Rows of a batch laid end to end without padding, each seeing only itself, for models that a probe shows to obey."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.cross_entropy import IGNORED
from lorakit.speed.last_layer import agree
from lorakit.speed.probing import attempt, token_ids


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


def obeys(model: Any, logits: Any) -> bool:
    """Whether a model gives two sequences laid end to end what it gives each alone; the caller sees to `at_rest`.

    Args:
        model: A causal transformers model, accelerated.
        logits: The plain model's logits of `token_ids`, (rows, tokens, V).
    """
    ids = token_ids(model)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        return False
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0  # of a causal model, the logits of the tokens that are left stay the same
    inputs, _ = end_to_end(ids, mask, ids)
    packed = attempt(lambda: model(**inputs, use_cache=False).logits[0])
    if isinstance(packed, Exception):  # it does not take such arguments
        return False
    return agree(packed, logits[mask.bool()])
