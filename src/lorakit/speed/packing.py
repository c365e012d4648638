"""Pack the rows of a batch into one row without padding, and check that a model keeps packed sequences apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.cross_entropy import IGNORED
from lorakit.speed.last_layer import agree
from lorakit.speed.probe import attempt, token_ids


def pack_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Pack all non-padding tokens of a batch, `attention_mask` 1 (rows, length), into one row without padding.

    Returns the arguments for the model (`input_ids` (1, tokens), positions and sequence boundaries), and the labels
    (1, tokens), without the first token of each sequence, which the last of another one must not predict.
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


def keeps_sequences_apart(model: nn.Module, logits: Tensor | None = None) -> bool:
    """Return whether a causal model computes the same logits for two packed sequences as for each sequence alone.

    Must be called inside `eval_mode`. `logits` (rows, tokens, V) for `token_ids` must be those of the same forward
    methods: in bf16, the rounding errors of a deep model exceed the tolerance.
    """
    ids = token_ids(model)
    if logits is None:
        separate = attempt(lambda: model(input_ids=ids, use_cache=False).logits)
        logits = None if isinstance(separate, Exception) else separate
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        return False
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0  # the model is causal, so the logits of the remaining tokens do not change
    inputs, _ = pack_rows(ids, mask, ids)
    packed = attempt(lambda: model(**inputs, use_cache=False).logits[0])
    # an exception means that the model does not accept these arguments
    return not isinstance(packed, Exception) and agree(packed, logits[mask.bool()])
