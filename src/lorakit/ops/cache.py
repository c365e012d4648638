"""Keys and values of many sequences, in blocks of tokens that are taken as sequences grow, and shared by prefixes; and
the attention of new tokens to them, for inference.

Attention reads the tokens of a row and, to make the rows of a batch equally long, zeros: masked NaN would pass through
`scaled_dot_product_attention`. So blocks are cleared when the last sequence gives them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.kernels import kernels_for

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument for a key-value cache in transformers, newest first."""

BLOCK = 32
"""Tokens per block."""


class Blocks:
    """The memory for keys and values, which grows with the number of blocks that sequences hold at the same time.

    Attributes:
        in_use: Number of blocks that sequences hold.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.in_use = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, each (slots, heads, width)
        self._holders = [1]  # of each block; nobody gives back block 0, whose zeros serve as padding
        self._free: list[int] = []

    def take(self) -> int:
        """Return a new block, which has one holder."""
        self.in_use += 1
        if self._free:
            block = self._free.pop()
            self._holders[block] = 1
            return block
        self._holders.append(1)
        return len(self._holders) - 1

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to each block."""
        for block in blocks:
            self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Remove a holder from each block, and clear the blocks that have none left."""
        for block in blocks:
            self._holders[block] -= 1
        left = [block for block in blocks if not self._holders[block]]
        slots = self.slots(left)
        for layer in self._layers.values():
            for tensor in layer:
                tensor.index_fill_(0, slots[slots < len(tensor)], 0)  # a failed pass may not have reached this layer
        self._free += left
        self.in_use -= len(left)

    def slots(self, blocks: Sequence[int]) -> Tensor:
        """Return the indices of the blocks' tokens, (tokens,)."""
        first = torch.tensor(blocks, dtype=torch.int64, device=self.device)[:, None] * BLOCK
        return (first + torch.arange(BLOCK, device=self.device)).flatten()

    @property
    def bytes_per_token(self) -> int:
        """Size of a token's keys and values in all layers; 0 before the first forward pass."""
        return sum(t[0].numel() * t.element_size() for layer in [*self._layers.values()] for t in layer)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (tokens, heads, width) in the slots (tokens,); return those of all slots."""
        stored = self.room(layer, keys, values)
        for tensor, new in zip(stored, (keys, values), strict=True):
            tensor.index_copy_(0, slots, new)
        return stored

    def room(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all slots, with room for tensors like these (tokens, heads, width)."""
        stored = self._layers.get(layer)
        missing = len(self._holders) * BLOCK - (0 if stored is None else len(stored[0]))
        if stored is None or missing > 0:
            stored = self._layers[layer] = self._grown(stored, keys, values, missing)
        return stored

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (rows, heads, length, width) in the slots (rows, length)."""
        keys, values = self._layers[layer]
        return self._gathered(keys, slots), self._gathered(values, slots)

    def _gathered(self, tensor: Tensor, slots: Tensor) -> Tensor:
        return tensor.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)

    def _grown(
        self, stored: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, missing: int
    ) -> tuple[Tensor, Tensor]:
        """Return larger tensors with what is stored; the size doubles, so that the cost per token stays constant."""
        if stored is None:
            first, second = (new.new_zeros(missing, *new.shape[1:]) for new in (keys, values))
            return first, second
        more = max(missing, len(stored[0]))
        first, second = (torch.cat([old, old.new_zeros(more, *old.shape[1:])]) for old in stored)
        return first, second


@dataclass(eq=False)
class Stored:
    """The tokens of one sequence that the model has processed: their number and their blocks."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def extend(self, pool: Blocks, new: int) -> None:
        """Take blocks for a number of new tokens."""
        missing = self.length + new - len(self.blocks) * BLOCK
        self.blocks += [pool.take() for _ in range(-(-missing // BLOCK))]
        if len(self.slots) != len(self.blocks) * BLOCK:
            self.slots = pool.slots(self.blocks)


class UnstorableError(Exception):
    """The keys and values of a model cannot be stored in blocks."""


class PassCache:
    """The cache of one forward pass over some sequences: the part of transformers' interface that models use.

    Shorter rows are padded with zeros after their tokens, so that the order of additions in attention does not depend
    on other rows, or before them, if a sliding window is measured from the last position.

    Args:
        pool: The memory.
        rows: The sequences.
        new: Number of new tokens per sequence; they have blocks for them.
        padding: Where the padding is; None for rows of the same length, which have none.
        is_contiguous: Whether the model needs contiguous keys and values.

    Attributes:
        is_used: Whether the model has stored anything.
        holds: Whether fused layers may run in this forward pass; None before the first one has checked it.
        mask: Which positions are tokens, (rows, length) of 1 and 0.
        positions: Positions of the new tokens, (rows, new).
        new: Number of new tokens per sequence.
        table: Slot of each position, (rows, length) int64.
        write: Slot of each new token, (rows · new,) int64.
        lengths: Number of tokens of each row, including the new ones, (rows,) int64, or None if padding is before them.
    """

    is_compileable = False

    def __init__(
        self,
        pool: Blocks,
        rows: Sequence[Stored],
        new: int,
        padding: Literal["before", "after"] | None,
        *,
        is_contiguous: bool,
    ) -> None:
        self._pool, self.new, self._is_contiguous = pool, new, is_contiguous
        self.is_used = False
        self.holds: bool | None = None
        lengths = [row.length + new for row in rows]
        longest = max(lengths)
        if padding is not None:  # some for every row, also for a row alone: the same kernels run
            longest = (longest // BLOCK + 1) * BLOCK
        read, mask = (torch.zeros(len(rows), longest, dtype=torch.int64, device=pool.device) for _ in range(2))
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            begin = longest - length if padding == "before" else 0
            read[i, begin : begin + length] = row.slots[:length]
            mask[i, begin : begin + length] = 1
        self.table, self.mask = read, mask
        self.lengths = None if padding == "before" else torch.tensor(lengths, device=pool.device)
        self.write = torch.cat([row.slots[row.length : row.length + new] for row in rows])
        first = torch.tensor([row.length for row in rows], device=pool.device)
        self.positions = first[:, None] + torch.arange(new, device=pool.device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (rows, heads, new, width), and return all (rows, heads, length, width).

        Raises:
            UnstorableError: The model stores another number of tokens than it was given.
        """
        if keys.shape[0] * keys.shape[2] != len(self.write):
            raise UnstorableError
        self.store(keys.transpose(1, 2), values.transpose(1, 2), layer_idx)
        all_keys, all_values = self._pool.read(layer_idx, self.table)
        return (all_keys.contiguous(), all_values.contiguous()) if self._is_contiguous else (all_keys, all_values)

    def store(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store new keys and values (rows, new, heads, width); return those of all slots (slots, heads, width)."""
        self.is_used = True
        return self._pool.write(layer_idx, self.write, keys.flatten(0, 1), values.flatten(0, 1))

    def room(self, like: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return those of all slots, to which the caller writes new ones; they are like a tensor (0, heads, width)."""
        self.is_used = True
        return self._pool.room(layer_idx, like, like)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions before the new tokens."""
        return self.table.shape[1] - self.new

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of positions, and the first one."""
        return self.table.shape[1], 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        """Return −1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length


SHORT = 1 << 13
"""Number of pairs of a new token and a position up to which the kernel is faster than copies and matmuls."""


def is_short(cache: PassCache) -> bool:
    """Return whether the rows have one new token each, or a single row has few pairs of new tokens and positions."""
    return cache.new == 1 or (len(cache.table) == 1 and cache.table.numel() * cache.new <= SHORT)


def attend_cached(
    q: Tensor, stored: tuple[Tensor, Tensor], cache: PassCache, scale: float, mask: Tensor | None, *, is_full: bool
) -> Tensor:
    """Return the attention (B, T, H, D) of the new tokens of a forward pass to their sequences.

    A kernel reads the sequences in place if `is_short`; else they are copied. With the kernel, the bits of a row depend
    on its own tokens alone, and no value of another sequence is read. Gradients are not recorded.

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
    if kernels is not None and kernels.slots is not None and cache.lengths is not None and is_full and is_short(cache):
        return kernels.slots.attend_slots(q.contiguous(), keys, values, cache.table, cache.lengths, scale)
    copied = (each.index_select(0, cache.table.flatten()).unflatten(0, cache.table.shape) for each in (keys, values))
    shared = q.shape[2] // keys.shape[1]
    all_keys, all_values = (each.repeat_interleave(shared, 2) if shared > 1 else each for each in copied)
    q, k, v = (each.transpose(1, 2) for each in (q, all_keys, all_values))
    causal = mask is None and cache.new > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)
