"""Which token attends to which: what a pattern means, and how a computation over it is cut into pieces."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Way = Literal["auto", "flash", "products", "products in fp32"]


@dataclass(frozen=True)
class Pattern:
    """Who attends to whom, and how scores become weights.

    causal: a token sees itself and what is before it; otherwise all.
    scale: factor on the products of q and k; None is 1/√D.
    window: causal: the last `window` tokens, itself included; otherwise tokens at most `window` away (as transformers).
    softcap: c in c·tanh(score/c), on the scaled scores before the softmax.
    segments: lengths of sequences laid end to end along T, the same in each row of the batch; no token sees another
    sequence's.
    dropout: share of the weights that become zero, each on its own; the others grow by 1/(1 − dropout).
    bias: frozen numbers added to the capped scores, (B, H, T, T) or with 1 for any of the first three; −∞ hides
    padding; who gives it sees to it that each token still sees one.
    way: "flash" is PyTorch's kernel for CPUs, "products" batched products by blocks of query rows, "products in fp32"
    the same of operands that are widened before; "auto" chooses by length, or as was measured.
    """

    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    segments: tuple[int, ...] | None = None
    dropout: float = 0.0
    bias: Tensor | None = field(default=None, compare=False)
    way: Way = "auto"

    def scale_for(self, width: int) -> float:
        """The factor on q·k for heads of this width."""
        return width**-0.5 if self.scale is None else self.scale

    def lengths(self, tokens: int) -> tuple[int, ...]:
        """Lengths of the sequences in a row of so many tokens."""
        return (tokens,) if self.segments is None else self.segments

    def windowed(self, tokens: int) -> bool:
        """Whether the window takes anything away in a row of so many tokens."""
        longest = max(self.lengths(tokens), default=0)
        return self.window is not None and self.window < (longest if self.causal else longest - 1)

    def span(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """First and last-but-one place that the rows start … stop of a sequence may see."""
        low, high = 0, stop if self.causal else length
        if self.window is not None:
            low = max(0, start - self.window + (1 if self.causal else 0))
            high = min(high, stop + self.window)
        return low, high

    def bounds(self, lengths: tuple[int, ...], start: int, stop: int, low: int) -> Tensor:
        """First and last-but-one place that each row start … stop of these sequences sees, from low, int32 (2, rows).

        Not to be written to: who asks the same gets the same tensor.
        """
        return _bounds(lengths, start, stop, low, self.causal, self.window)

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether places (n,) of a sequence see places (m,) of it, (n, m)."""
        distance = queries.unsqueeze(1) - keys
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen &= distance < self.window if self.causal else distance.abs() <= self.window
        return seen

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """That q (B, H, T, D), k (B, KV, T, D) and v (B, KV, T, E) are attention's operands under this pattern.

        Raises:
            ValueError: Their shapes or dtypes do not fit, segments do not fill T, or a number is out of its range.
        """
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if not q.dim() == k.dim() == v.dim() == 4:
            raise ValueError(f"attention takes tensors (batch, heads, tokens, width), and was given {shapes}")
        heads = k.shape[1]
        if q.shape[0::2] != k.shape[0::2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
            raise ValueError(f"{shapes}: batch and tokens must be the same, and the width of q and k")
        if heads == 0 or q.shape[1] % heads:
            raise ValueError(f"{q.shape[1]} heads of q cannot share {heads} heads of k and v evenly")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; attention takes one dtype")
        if self.segments is not None and (sum(self.segments) != q.shape[2] or min(self.segments, default=0) < 1):
            found = f"{len(self.segments)} lengths, {sum(self.segments)} tokens in sum"
            raise ValueError(f"segments must be positive and fill the {q.shape[2]} tokens of a row; these are {found}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} tokens sees nothing; give 1 or more, or None for no window")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be above 0, or None for none; it is {self.softcap}")
        if self.bias is not None:
            self._check_bias(self.bias, q)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout of attention's weights is at least 0 and below 1; it is {self.dropout}")

    @staticmethod
    def _check_bias(bias: Tensor, q: Tensor) -> None:
        batch, heads, tokens, _ = q.shape
        fits = bias.dim() == 4 and bias.shape[3] == tokens
        wanted = (batch, heads, tokens)
        if not fits or any(size not in (1, whole) for size, whole in zip(bias.shape[:3], wanted, strict=True)):
            raise ValueError(
                f"the bias of attention's scores has shape {tuple(bias.shape)}, not {(*wanted, tokens)} or with 1 in "
                "the first three"
            )
        if bias.requires_grad or not bias.is_floating_point():
            raise ValueError(
                f"the bias of attention's scores is frozen numbers; this one is {bias.dtype} and "
                f"{'asks' if bias.requires_grad else 'does not ask'} for a gradient"
            )


@functools.lru_cache(maxsize=256)  # the layers of a model ask for the same
def _bounds(lengths: tuple[int, ...], start: int, stop: int, low: int, causal: bool, window: int | None) -> Tensor:
    places = torch.arange(start, stop, dtype=torch.int32)
    begins, ends = torch.zeros_like(places), torch.full_like(places, sum(lengths))
    if len(lengths) > 1:
        sizes = torch.tensor(lengths, dtype=torch.int32)
        after = sizes.cumsum(0, dtype=torch.int32)
        ends = after.repeat_interleave(sizes)[start:stop]
        begins = (after - sizes).repeat_interleave(sizes)[start:stop]
    if causal:
        ends = places + 1
    if window is not None:
        begins = torch.maximum(begins, places - window + (1 if causal else 0))
        ends = torch.minimum(ends, places + window + 1)
    return torch.stack((begins, ends)).sub_(low)


class Piece(NamedTuple):
    """A part of attention that is alone with itself: rows of the batch × tokens that hold these sequences."""

    batch: slice
    tokens: slice
    lengths: tuple[int, ...]


def pieces(batch: int, tokens: int, pattern: Pattern, rows_at_once: int, join: int) -> Iterator[Piece]:
    """All pieces: a sequence each, or several short neighbours of at most `join` tokens together."""
    start = 0
    gathered: list[int] = []
    for length in (*pattern.lengths(tokens), None):
        if gathered and (length is None or sum(gathered) + length > join):
            stop = start + sum(gathered)
            for row in range(0, batch, rows_at_once):
                yield Piece(slice(row, min(batch, row + rows_at_once)), slice(start, stop), tuple(gathered))
            start, gathered = stop, []
        gathered += [] if length is None else [length]


def mask(pattern: Pattern, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Whether each token of a row sees each other, (T, T), for sequences of these lengths."""
    which = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], device=device)
    places = torch.arange(len(which), device=device)
    return pattern.allowed(places, places) & (which.unsqueeze(1) == which)
