"""Attention patterns (which tokens each token sees), and the pieces into which an attention computation is split."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["auto", "flash", "matmul", "matmul_fp32"]

Operands = tuple[Tensor, Tensor, Tensor]
"""q (B, H, T, D), k (B, KV, T, D) and v (B, KV, T, E), or their gradients."""


@dataclass(frozen=True)
class Pattern:
    """Mask, scaling and dropout for an attention computation.

    Attributes:
        causal: Whether a token sees only itself and earlier tokens.
        scale: Scale factor for q·kᵀ; None means 1/√D.
        window: Tokens that a causal token sees, itself included, or else the greatest distance, as in transformers.
        softcap: Bound c in c·tanh(score/c), applied to the scaled scores before the softmax, or None.
        segments: Lengths of the sequences packed along T in each row, which do not see each other; None means one.
        dropout: Probability that an attention weight is zeroed; the others are divided by 1 − dropout.
        bias: Frozen tensor added to the capped scores, (B, H, T, T), where any of the first three dimensions may be 1;
            −∞ masks padding, but each token must see at least one token.
        sinks: Frozen tensor (H,): a score per head of q that takes part in each row's softmax but has no value, and is
            not scaled, capped or dropped.
        method: "flash" (PyTorch's kernel), "matmul" (over blocks of query rows), "matmul_fp32" (the same with upcast
            operands), or "auto": "flash" on CUDA if possible; on a CPU by autotuning results or sequence length.
    """

    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    segments: tuple[int, ...] | None = None
    dropout: float = 0.0
    bias: Tensor | None = field(default=None, compare=False)
    sinks: Tensor | None = field(default=None, compare=False)
    method: Method = "auto"

    def scale_for(self, width: int) -> float:
        """Return the scale factor for q·kᵀ in heads of the given width."""
        return width**-0.5 if self.scale is None else self.scale

    def lengths(self, tokens: int) -> tuple[int, ...]:
        """Return the lengths of the sequences in a row of `tokens` tokens."""
        return (tokens,) if self.segments is None else self.segments

    def windowed(self, tokens: int) -> bool:
        """Return whether the window hides any position in a row of `tokens` tokens."""
        longest = max((0, *self.lengths(tokens)))  # torch.compile does not support max(…, default=0)
        return self.window is not None and self.window < (longest if self.causal else longest - 1)

    def span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Return the range [low, high) that covers all positions visible to the rows [start, stop) of a sequence."""
        low, high = 0, stop if self.causal else length
        if self.window is not None:
            low = max(0, start - self.window + (1 if self.causal else 0))
            high = min(high, stop + self.window)
        return low, high

    def bounds(self, lengths: tuple[int, ...], start: int, stop: int, low: int) -> Tensor:
        """Return, for each of the rows [start, stop) of packed sequences, its first position and the end of its range.
        The result is int32 (2, rows), relative to `low`, cached and shared: do not write to it.
        """
        compute = _bounds if torch.compiler.is_compiling() else _cached_bounds  # torch.compile cannot trace a cache
        return compute(lengths, start, stop, low, self.causal, self.window)

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return a boolean mask (n, m), true where a position in `queries` (n,) sees a position in `keys` (m,)."""
        distance = queries.unsqueeze(1) - keys
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.segments is not None:
            ends = torch.tensor(self.segments, device=keys.device).cumsum(0)
            of_queries, of_keys = (torch.bucketize(positions, ends, right=True) for positions in (queries, keys))
            seen &= of_queries.unsqueeze(1) == of_keys
        if self.window is not None:
            seen &= distance < self.window if self.causal else distance.abs() <= self.window
        return seen

    def check(self, q: Tensor) -> None:
        """Check that q (B, H, T, D) and this pattern fit.

        Raises:
            ValueError: Segments do not sum to T, a value is out of range, or bias or sinks do not fit or are trained.
        """
        if self.segments is not None and (sum(self.segments) != q.shape[2] or min((*self.segments, q.shape[2])) < 1):
            lengths = f"{len(self.segments)} lengths with {sum(self.segments)} tokens in total"
            raise ValueError(f"segments must be positive and sum to {q.shape[2]} tokens; got {lengths}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, or None; got {self.window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be above 0, or None; got {self.softcap}")
        self._check_tensors(q)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"attention dropout must be in [0, 1); got {self.dropout}")

    def _check_tensors(self, q: Tensor) -> None:
        """Check the shapes and dtypes of the bias and the sinks, and that both are frozen."""
        batch, heads, tokens, _ = q.shape
        if self.bias is not None:
            fits = self.bias.dim() == 4 and self.bias.shape[3] == tokens
            wanted = (batch, heads, tokens)
            if not fits or any(size not in (1, whole) for size, whole in zip(self.bias.shape[:3], wanted, strict=True)):
                raise ValueError(
                    f"attention bias must have shape {(*wanted, tokens)}, with 1 allowed in the first three "
                    f"dimensions; got {tuple(self.bias.shape)}"
                )
        if self.sinks is not None and self.sinks.shape != (heads,):
            raise ValueError(
                f"attention sinks must have shape {(heads,)}, one for each head of q; got {tuple(self.sinks.shape)}"
            )
        for name, tensor in (("bias", self.bias), ("sinks", self.sinks)):
            if tensor is not None and (tensor.requires_grad or not tensor.is_floating_point()):
                raise ValueError(
                    f"attention {name} must be floating-point and frozen; got {tensor.dtype} with "
                    f"requires_grad={tensor.requires_grad}"
                )


def _bounds(lengths: tuple[int, ...], start: int, stop: int, low: int, causal: bool, window: int | None) -> Tensor:
    targets = torch.arange(start, stop, dtype=torch.int32)
    begins, ends = torch.zeros_like(targets), torch.full_like(targets, sum(lengths))
    if len(lengths) > 1:
        sizes, total = torch.tensor(lengths, dtype=torch.int32), sum(lengths)
        after = sizes.cumsum(0, dtype=torch.int32)
        ends = after.repeat_interleave(sizes, output_size=total)[start:stop]
        begins = (after - sizes).repeat_interleave(sizes, output_size=total)[start:stop]
    if causal:
        ends = targets + 1
    if window is not None:
        begins = torch.maximum(begins, targets - window + (1 if causal else 0))
        ends = torch.minimum(ends, targets + window + 1)
    return torch.stack((begins, ends)).sub_(low)


_cached_bounds = functools.lru_cache(maxsize=256)(_bounds)  # all layers of a model request the same bounds


class Piece(NamedTuple):
    """Batch rows and tokens, in sequences of the given lengths, for which attention can be computed separately."""

    batch: slice
    tokens: slice
    lengths: tuple[int, ...]


def pieces(batch: int, tokens: int, pattern: Pattern, rows_at_once: int, join: int) -> Iterator[Piece]:
    """Yield all pieces, each one sequence or adjacent sequences with at most `join` tokens in total."""
    start = 0
    gathered: list[int] = []
    for length in (*pattern.lengths(tokens), None):
        if gathered and (length is None or sum(gathered) + length > join):
            stop = start + sum(gathered)
            for row in range(0, batch, rows_at_once):
                yield Piece(slice(row, min(batch, row + rows_at_once)), slice(start, stop), tuple(gathered))
            start, gathered = stop, []
        gathered += [] if length is None else [length]
