"""Attention by batched matmuls, one block of query rows at a time. [docs/math.md (81), (82), (86)]

Heads of q that share a head of k become additional rows of one matmul, so k and v are not repeated. A block computes
only the columns that its rows can see, in a buffer that all blocks share. The backward pass recomputes the scores, so
neither a T × T tensor nor softmax statistics are saved. Dropout for all blocks is drawn at once and saved as a seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops.attention_pattern import Operands, Pattern, Piece, pieces
from lorakit.ops.dropout import apply_dropout, draw_record, kept_elements, zero_
from lorakit.ops.kernels import kernels_for

BLOCK = 64  # query rows per block: enough for efficient matmuls, but few enough to skip most masked scores
SCORES = 2**22  # maximum number of elements in the score buffer, unless even a block of 8 rows exceeds it
TOGETHER = 2**20  # maximum number of scores computed together for several batch rows, so that they fit in the cache
# the three limits above for other devices, where each piece costs kernel launches and cache size does not matter
ON_DEVICES = (512, 2**28, 2**28)


class _Block(NamedTuple):
    """A block of query rows [start, stop) in a piece, and the key positions [low, high) that these rows see."""

    start: int
    stop: int
    low: int
    high: int


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
    """Return softmax(scores)·v (B, H, T, E), stored as (B, T, H, E), and the dropout record for the weights."""
    batch, heads, tokens, _ = q.shape
    out = torch.empty(batch, tokens, heads, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    scores = _Scores(q, k, pattern)
    record = scores.draw()
    zeros = scores.by_block(record)
    for piece in scores.pieces:
        keys, values = (_cut(t, piece).flatten(0, 1) for t in (k, v))
        queries, written = _cut(q, piece), _cut(out, piece)
        for block in scores.blocks(piece):
            weights, _ = scores.weights(_rows(queries, block, keys), keys, piece, block)
            zero = next(zeros)
            if zero is not None:
                zero_(weights, zero, pattern.dropout)
            _put(written, block, _scaled(weights, values[:, block.low : block.high], scores.share))
    return out, record


def backward(dout: Tensor, operands: Operands, into: Operands, pattern: Pattern, record: Tensor | None) -> None:
    """Write the gradients of q (B, H, T, D), k (B, KV, T, D) and v (B, KV, T, E) to the tensors in `into`. These must
    not share storage with the operands, but may with dout (B, H, T, E), whose rows are read before.
    """
    q, k, v = operands
    scores = _Scores(q, k, pattern)
    zeros = scores.by_block(record)
    wide = torch.promote_types(q.dtype, torch.float32)
    for piece in scores.pieces:
        queries, incoming, dq = (_cut(t, piece) for t in (q, dout, into[0]))
        keys, values = (_cut(t, piece).flatten(0, 1) for t in (k, v))
        dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (keys, values))  # sums over blocks
        for block in scores.blocks(piece):
            seen = slice(block.low, block.high)
            rows, dy = _rows(queries, block, keys), _rows(incoming, block, keys)
            weights, capped = scores.weights(rows, keys, piece, block)
            zero = next(zeros)
            dv[:, seen].add_(_scaled(scores.dropped(weights, zero).transpose(1, 2), dy, scores.share))
            ds = scores.backward(dy, values[:, seen], weights, capped, zero)
            _put(dq, block, _scaled(ds, keys[:, seen], scores.scale))
            dk[:, seen].add_(_scaled(ds.transpose(1, 2), rows, scores.scale))
        for total, grad in ((dk, into[1]), (dv, into[2])):
            _cut(grad, piece).copy_(total.view(_cut(grad, piece).shape))


def kept_weights(q: Tensor, k: Tensor, pattern: Pattern, record: Tensor) -> Tensor:
    """Return a mask (B, H, T, T) that is 1 for each weight that a dropout record keeps, for q and k as in `forward`."""
    mask = q.new_ones(*q.shape[:3], q.shape[2])
    scores = _Scores(q, k, pattern)
    zeros = scores.by_block(record)
    for piece in scores.pieces:
        for block in scores.blocks(piece):
            of_piece, zero = mask[piece.batch, :, piece.tokens, piece.tokens], next(zeros)
            at = of_piece[:, :, block.start : block.stop, block.low : block.high]
            if zero is not None:
                at.copy_(kept_elements(zero, at.shape, pattern.dropout, q.dtype))
    return mask


class _Scores:
    """The softmax weights and their gradients, computed one block at a time in reused buffers."""

    def __init__(self, q: Tensor, k: Tensor, pattern: Pattern) -> None:
        batch, heads, tokens, width = q.shape
        self.pattern, self.scale, self.group = pattern, pattern.scale_for(width), heads // k.shape[1]
        self.heads, self.device, self.share = heads, q.device, 1 / (1 - pattern.dropout)
        block, most, at_once = (BLOCK, SCORES, TOGETHER) if q.device.type == "cpu" else ON_DEVICES
        longest = max(*pattern.lengths(tokens), min(block, tokens), 1)
        seen = longest if pattern.window is None else min(longest, 2 * pattern.window + block)
        self.rows = min(block, longest, max(8, most // (heads * seen)))
        together = max(1, min(batch, at_once // (heads * self.rows * seen)))
        self.pieces = list(pieces(batch, tokens, pattern, together, join=self.rows))
        self.most = min(batch, together) * heads * self.rows * seen
        self.added: Tensor | None = None  # view of the bias, (B, KV, G, T, T)
        if pattern.bias is not None:
            every = pattern.bias.to(q.dtype).expand(batch, heads, tokens, tokens)
            self.added = every.unflatten(1, (-1, self.group))
        self.sinks: Tensor | None = None  # (H, 1, 1) in fp32 or wider
        self.of_sinks: Tensor | None = None  # weights of the sinks in the last block, (Z, G·n, 1)
        if pattern.sinks is not None:
            self.sinks = pattern.sinks.to(torch.promote_types(q.dtype, torch.float32)).view(-1, 1, 1)
        self.buffers: dict[int, Tensor] = {}
        self.masks: dict[tuple[tuple[int, ...], int, int, int], Tensor] = {}

    def blocks(self, piece: Piece) -> Iterator[_Block]:
        """Yield the blocks of query rows in a piece, with the key positions that each block sees."""
        length = piece.tokens.stop - piece.tokens.start
        for start in range(0, length, self.rows):
            stop = min(length, start + self.rows)
            yield _Block(start, stop, *self.pattern.span(start, stop, length))

    def draw(self) -> Tensor | None:
        """Draw a dropout record for the concatenated weights of all blocks; return None if dropout is disabled."""
        if self.pattern.dropout == 0:
            return None
        return draw_record(sum(self._sizes()), self.pattern.dropout, self.device)

    def by_block(self, record: Tensor | None) -> Iterator[Tensor | None]:
        """Yield the dropout record for each block: a slice of the mask, or a seed derived from the recorded seed."""
        if record is None:
            return itertools.repeat(None)
        if record.dtype == torch.bool:
            return iter(record.split(self._sizes()))
        return ((record.view(torch.int64) + i).view(torch.uint64) for i in itertools.count())

    def dropped(self, weights: Tensor, zero: Tensor | None) -> Tensor:
        """Return the block's weights (Z, G·n, m) after dropout, in a separate buffer."""
        if zero is None:
            return weights
        return apply_dropout(weights, zero, self.pattern.dropout, out=self._buffer(3, weights, weights.transpose(1, 2)))

    def _sizes(self) -> list[int]:
        """Return the number of scores in each block."""
        return [
            (piece.batch.stop - piece.batch.start) * self.heads * (at.stop - at.start) * (at.high - at.low)
            for piece in self.pieces
            for at in self.blocks(piece)
        ]

    def weights(self, rows: Tensor, keys: Tensor, piece: Piece, block: _Block) -> tuple[Tensor, Tensor | None]:
        """Return the softmax of a block's scores (Z, G·n, m) and, if there is a softcap, tanh(scores / softcap)."""
        seen, cap = keys[:, block.low : block.high], self.pattern.softcap
        scores = self._buffer(0, rows, seen)
        scale = self.scale if cap is None else self.scale / cap
        torch.baddbmm(scores, rows, seen.transpose(1, 2), beta=0, alpha=scale, out=scores)
        capped = None
        if cap is not None:
            capped = torch.tanh(scores, out=self._buffer(1, rows, seen))
            torch.mul(capped, cap, out=scores)
        if self.added is not None:
            rest = self.added[piece.batch, :, :, piece.tokens, piece.tokens]
            rest = rest[..., block.start : block.stop, block.low : block.high]
            scores.view(rest.shape).add_(rest)
        is_banded = len(piece.lengths) > 1 or self.pattern.window is not None
        is_masked = is_banded or self.pattern.causal
        kernels = kernels_for(scores) if self.sinks is None else None  # the kernels do not support sinks
        if kernels is not None:
            kernels.softmax(scores, *(self._bounds(piece, block, block.low) if is_masked else (None, None)))
            return scores, capped
        if is_masked:
            bias = self._bias(piece, block, block.low if is_banded else block.start, rows.dtype)
            each_head = scores.view(len(scores), self.group, block.stop - block.start, seen.shape[1])
            each_head[..., -bias.shape[1] :].add_(bias)
        if self.sinks is None:
            return torch.softmax(scores, -1, out=scores), capped
        of_sinks = _softmax_with_sinks(scores.view(-1, self.heads, block.stop - block.start, seen.shape[1]), self.sinks)
        self.of_sinks = of_sinks.view(*scores.shape[:2], 1)
        return scores, capped

    def backward(
        self, dy: Tensor, values: Tensor, weights: Tensor, capped: Tensor | None, zero: Tensor | None
    ) -> Tensor:
        """Return the gradient of the scaled scores (Z, G·n, m); dy (Z, G·n, E) is the gradient of the output rows."""
        ds = self._buffer(2, dy, values)
        torch.baddbmm(ds, dy, values.transpose(1, 2), beta=0, alpha=self.share, out=ds)
        if zero is not None:
            zero_(ds, zero, self.pattern.dropout)
        at_top = None
        if self.of_sinks is not None:
            # A shift of all gradients of a row has no effect. This one keeps digits where one token dominates, as the
            # subtraction of the maximum does in the backward pass of transformers' function.
            at_top = ds.gather(-1, weights.argmax(-1, keepdim=True))
            ds.sub_(at_top)
        kernels = kernels_for(ds, weights)
        if kernels is not None:
            kernels.softmax_backward(weights, ds)
        else:
            torch.ops.aten._softmax_backward_data.out(ds, weights, -1, ds.dtype, grad_input=ds)
        if at_top is not None and self.of_sinks is not None:
            ds.addcmul_(weights, (self.of_sinks * at_top).to(ds.dtype))
        if capped is not None:
            torch.ops.aten.tanh_backward.grad_input(ds, capped, grad_input=ds)
        return ds

    def _buffer(self, which: int, rows: Tensor, seen: Tensor) -> Tensor:
        shape = (rows.shape[0], rows.shape[1], seen.shape[1])
        count = shape[0] * shape[1] * shape[2]
        if which not in self.buffers:
            self.buffers[which] = torch.empty(self.most, dtype=rows.dtype, device=rows.device)
        return self.buffers[which][:count].view(shape)

    def _bounds(self, piece: Piece, block: _Block, begin: int) -> tuple[Tensor, Tensor]:
        """Return int32 tensors `low` and `high` (n,); row i sees the positions [begin + low[i], begin + high[i])."""
        bounds = self.pattern.bounds(piece.lengths, block.start, block.stop, begin)
        low, high = bounds.to(self.device, non_blocking=True)
        return low, high

    def _bias(self, piece: Piece, block: _Block, begin: int, dtype: torch.dtype) -> Tensor:
        """Return a bias (n, m): 0 for a position from `begin` that a row sees, −∞ otherwise; all before are seen."""
        lengths = piece.lengths if len(piece.lengths) > 1 else ()
        key = (lengths, block.stop - block.start, block.start - begin, block.high - begin)
        if key not in self.masks:
            low, high = self._bounds(piece, block, begin)
            targets = torch.arange(block.high - begin, device=self.device)
            seen = (targets >= low.unsqueeze(1)) & (targets < high.unsqueeze(1))
            bias = torch.zeros(seen.shape, dtype=dtype, device=self.device)
            self.masks[key] = bias.masked_fill_(~seen, -torch.inf)
        return self.masks[key]


def _cut(x: Tensor, piece: Piece) -> Tensor:
    return x[piece.batch, :, piece.tokens]


def _rows(x: Tensor, block: _Block, keys: Tensor) -> Tensor:
    """Return a block's rows of x (b, H, T, D) as (b·KV, G·n, D): heads that share a key head form one matrix."""
    return x[:, :, block.start : block.stop].reshape(len(keys), -1, x.shape[3])


def _put(x: Tensor, block: _Block, rows: Tensor) -> None:
    """Write the rows of a block, (b·KV, G·n, D), back to x (b, H, T, D): the inverse of `_rows`."""
    written = x[:, :, block.start : block.stop]
    written.copy_(rows.view(written.shape))


def _softmax_with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """Replace scores (b, H, n, m) with their softmax, with a sink per head (H, 1, 1); return the sinks' weights."""
    wide = scores.to(sinks.dtype)
    top = wide.amax(-1, keepdim=True).maximum(sinks)
    wide.sub_(top).exp_()
    of_sinks = (sinks - top).exp_()
    total = wide.sum(-1, keepdim=True).add_(of_sinks)
    torch.div(wide, total, out=scores)
    return of_sinks.div_(total)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype, device=a.device)
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
