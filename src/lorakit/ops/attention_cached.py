"""Attention of new tokens to the keys and values that a cache has stored for their sequences, for inference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.cache import PassCache
from lorakit.ops.kernels import kernels_for


def attend_cached(
    q: Tensor, stored: tuple[Tensor, Tensor], cache: PassCache, scale: float, mask: Tensor | None, *, is_full: bool
) -> Tensor:
    """Return the attention (B, T, H, D) of the new tokens of a forward pass to their sequences.

    A kernel reads the sequences in place if there is one new token per row; else they are copied. With the kernel, the
    bits of a row depend on its own tokens alone, and no value of another sequence is read. Gradients are not recorded.

    Args:
        q: New queries, (B, T, H, D).
        stored: What `cache.store` returned: keys and values, (slots, K, D), where H is a multiple of K.
        cache: The cache of this forward pass.
        scale: Factor of the scores.
        mask: Which positions a token sees, (B, 1, T, length), as for `scaled_dot_product_attention`; None if all up to
            itself.
        is_full: Whether tokens see all tokens before them, so that the mask says nothing else.
    """
    keys, values = stored
    kernels = kernels_for(q, keys, values)
    if kernels is not None and kernels.slots is not None and is_full and cache.new == 1 and cache.lengths is not None:
        return kernels.slots.attend_slots(q[:, 0], keys, values, cache.table, cache.lengths, scale)[:, None]
    copied = (each.index_select(0, cache.table.flatten()).unflatten(0, cache.table.shape) for each in (keys, values))
    shared = q.shape[2] // keys.shape[1]
    all_keys, all_values = (each.repeat_interleave(shared, 2) if shared > 1 else each for each in copied)
    q, k, v = (each.transpose(1, 2) for each in (q, all_keys, all_values))
    causal = mask is None and cache.new > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)
