"""What the mask of a call hides beside its pattern: nothing, padding, or more; a mask is read once for all layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorakit.ops.attention_pattern import Pattern
from lorakit.speed.versions import is_version, version_of

HIDDEN = -1e4
"""Numbers at or below this hide a place: the least of a dtype is added to its score."""

READ = "_lorakit_read"
"""Where a mask, which all layers of a forward share, keeps what is known of it, with its version then."""


def under(mask: Any, x: Tensor, pattern: Pattern) -> Pattern | None:
    """A pattern with what a mask hides beside it.

    Args:
        mask: (rows or 1, heads or 1, T, T), true or 0 where a token is seen; or None.
        x: Hidden states, (rows, T, d).
        pattern: Who sees whom without it; it may have a bias.

    Returns:
        The pattern, with a bias where that hides more, or None where the mask shows more than the pattern, hides all
        from a token, or is no such mask; and where there is a bias on a device of which no kernel here takes one.
    """
    made = _under(mask, x, pattern)
    return None if made is None or (made.bias is not None and x.device.type != "cpu") else made


def _under(mask: Any, x: Tensor, pattern: Pattern) -> Pattern | None:
    if mask is None:
        return pattern
    rows, tokens, _ = x.shape
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (tokens, tokens) or mask.requires_grad:
        return None
    if mask.shape[0] not in (1, rows):
        return None
    known = _known(mask)
    key = (pattern.causal, pattern.window, x.dtype)
    if key not in known:
        known[key] = _read(mask, pattern, x.dtype)
    padding = known[key]
    if not isinstance(padding, Tensor):
        return pattern if padding else None
    if pattern.bias is None:
        return replace(pattern, bias=padding)
    with_bias = (*key, "with bias")
    of_bias, version, both = known.get(with_bias, (None, 0, padding))
    if of_bias is not pattern.bias or not is_version(pattern.bias, version):
        both = padding + pattern.bias.to(x.dtype)
        known[with_bias] = pattern.bias, version_of(pattern.bias), both
    return replace(pattern, bias=both)


def _known(mask: Tensor) -> dict[Any, Any]:
    """Return what is known of a mask as it is now, to be added to."""
    version, known = mask.__dict__.get(READ, (None, {}))
    if version is None or not is_version(mask, version):
        known = {}
        mask.__dict__[READ] = version_of(mask), known
    return known


def _read(mask: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor | bool:
    """What a mask adds to the scores; or whether it says what the pattern says."""
    hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN
    if mask.dtype != torch.bool and not bool((hidden | (mask == 0)).all()):
        return False
    places, seen = torch.arange(mask.shape[-1], device=mask.device), ~hidden
    allowed = pattern.allowed(places, places)
    if bool((seen == allowed).all()):
        return True
    if bool((seen & ~allowed).any()) or not bool(seen.any(-1).all()):
        return False
    keys = seen.any(-2, keepdim=True)
    least = keys if bool(((keys & allowed) == seen).all()) else seen  # padding is the same for every token of a row
    return torch.zeros(least.shape, dtype=dtype, device=mask.device).masked_fill_(~least, -torch.inf)
