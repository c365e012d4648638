"""Attention over a cache: the exact sums up to rounding, and rows that read nothing of each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops import cache
from lorakit.ops.cache import BLOCK, Blocks, PassCache, Stored, attend_cached
from lorakit.ops.kernels import compiled

needs_kernels = pytest.mark.skipif(compiled.kernels() is None, reason=f"no kernels: {compiled.describe()}")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LENGTHS = (1, 2, 16, 17, BLOCK, BLOCK + 1, 3 * BLOCK + 5)
KV, WIDTH, SCALE = 2, 24, 0.3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Sequences:
    """Sequences of the given lengths in one pool, with the keys and values of all tokens but the last ones."""

    def __init__(self, lengths: tuple[int, ...], dtype: torch.dtype, new: int = 1, group: int = 3) -> None:
        self.pool, self.new = Blocks(torch.device("cpu")), new
        self.rows = [Stored() for _ in lengths]
        self.tokens = [normal(3, n, KV * group, WIDTH, seed=i).to(dtype) for i, n in enumerate(lengths)]
        for row, (_, k, v) in zip(self.rows, self.tokens, strict=True):
            before = k.shape[0] - new
            row.extend(self.pool, before)
            if before:
                cache = PassCache(self.pool, [row], before, None, is_contiguous=False)
                cache.store(k[None, :before, :KV], v[None, :before, :KV], 0)
            row.length = before
            row.extend(self.pool, new)

    def attend(self, *which: int, padding: str | None = "after") -> Tensor:
        """Return the attention of the last tokens of these sequences, in one call."""
        cache = PassCache(self.pool, [self.rows[i] for i in which], self.new, padding, is_contiguous=False)  # type: ignore[arg-type]
        q, k, v = (torch.stack([self.tokens[i][part, -self.new :] for i in which]) for part in range(3))
        at = cache.table.shape[1] - self.new + torch.arange(self.new)[:, None]
        causal = torch.arange(cache.table.shape[1]) <= at if self.new > 1 else torch.tensor(True)
        mask = cache.mask[:, None, None].bool() & causal
        stored = cache.store(k[:, :, :KV], v[:, :, :KV], 0)
        return attend_cached(q, stored, cache, SCALE, mask, is_full=True)

    def exact(self, which: int) -> Tensor:
        q, k, v = self.tokens[which].double()
        k, v = (each[:, :KV].repeat_interleave(q.shape[1] // KV, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)[-self.new :]


@dtypes
@pytest.mark.parametrize("padding", ["after", "before"])
@pytest.mark.parametrize("group", [1, 3])
def test_each_row_attends_to_its_own_sequence(dtype: torch.dtype, padding: str, group: int) -> None:
    sequences = Sequences(LENGTHS, dtype, group=group)
    together = sequences.attend(*range(len(LENGTHS)), padding=padding)
    for i in range(len(LENGTHS)):
        torch.testing.assert_close(together[i].double(), sequences.exact(i), rtol=0, atol=TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("length", [5, BLOCK + 5])
def test_several_new_tokens_see_the_tokens_before_them(dtype: torch.dtype, length: int) -> None:
    sequences = Sequences((length,), dtype, new=5)
    y = sequences.attend(0, padding=None)
    torch.testing.assert_close(y[0].double(), sequences.exact(0), rtol=0, atol=TOLERANCE[dtype])


@needs_kernels
@dtypes
def test_a_row_has_the_same_bits_alone_and_with_nan_and_huge_values_in_all_other_slots(dtype: torch.dtype) -> None:
    sequences = Sequences(LENGTHS, dtype)
    together = sequences.attend(*range(len(LENGTHS)))
    assert torch.equal(sequences.attend(*reversed(range(len(LENGTHS)))).flip(0), together)
    for i in range(len(LENGTHS)):
        fresh = Sequences(LENGTHS, dtype)
        own = fresh.rows[i].slots[: LENGTHS[i]]
        for tensor in fresh.pool._layers[0]:
            others = torch.ones(len(tensor), dtype=torch.bool).index_fill_(0, own, False)
            tensor[others] = torch.nan if i % 2 else 3e38
        assert torch.equal(fresh.attend(i)[0], together[i])


@needs_kernels
def test_nan_in_a_row_stays_in_it() -> None:
    sequences = Sequences((7, 9), torch.bfloat16)
    expected = sequences.attend(0, 1)
    sequences.pool._layers[0][0][sequences.rows[0].slots[3]] = torch.nan
    y = sequences.attend(0, 1)
    assert y[0].isnan().all() and torch.equal(y[1], expected[1])


@needs_kernels
def test_without_a_kernel_the_sequences_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Sequences(LENGTHS, torch.float32).attend(*range(len(LENGTHS)))
    monkeypatch.setattr(cache, "kernels_for", lambda *_: None)
    y = Sequences(LENGTHS, torch.float32).attend(*range(len(LENGTHS)))
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
