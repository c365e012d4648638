"""The kernel for a whole decoder layer: every operand is checked before anything is written; its sums are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.kernels import compiled
from lorakit.ops.kernels.decoder_layer import LayerOperands, RowLinear

KERNELS = compiled.kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason=f"no kernels: {compiled.describe()}")
ROWS, TOKENS, D, HEADS, KV, WIDTH, INNER, RANK, SLOTS = 3, 2, 12, 4, 2, 6, 10, 3, 20
SHAPES = ((24, D), (12, D), (12, D), (D, 24), (INNER, D), (INNER, D), (D, INNER))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7 * seed + sum(shape)))


def operands() -> LayerOperands:
    index = torch.tensor([1, -1, 0])
    linears = [
        RowLinear(
            normal(out, width, seed=i) / 4,
            normal(out, seed=i),
            [(normal(2, RANK, width, seed=i) / 4, normal(2, RANK, out, seed=i) / 4, index)],
        )
        for i, (out, width) in enumerate(SHAPES)
    ]
    norms = [(1 + normal(size, seed=i) / 9, 1e-6, i % 2.0) for i, size in enumerate((D, D, D, D, WIDTH, WIDTH))]
    rotary = normal(ROWS, TOKENS, 4), normal(ROWS, TOKENS, 4, seed=1)
    pool = normal(SLOTS, KV, WIDTH), normal(SLOTS, KV, WIDTH, seed=1)
    table = torch.arange(ROWS * 5).view(ROWS, 5)
    lengths = torch.tensor([2, 5, 4])
    write = torch.cat([row[n - TOKENS : n] for row, n in zip(table, lengths.tolist(), strict=True)])
    return LayerOperands(linears, norms, compiled.ACTIVATIONS["silu"], 0.4, rotary, *pool, write, table, lengths)


def run(given: LayerOperands, x: Tensor) -> Tensor:
    assert KERNELS is not None
    return KERNELS.layer.decoder_layer(x, given)


def exact(given: LayerOperands, x: Tensor) -> Tensor:
    """Return the output in float64, from the formulas."""

    def linear(which: int, h: Tensor) -> Tensor:
        one = given.linears[which]
        assert one is not None
        (A, Bt, index), bias = one.stacks[0], one.bias
        y = F.linear(h, one.W.double(), None if bias is None else bias.double())
        for i, k in enumerate(index.tolist()):
            y[i] += h[i] @ A[k].double().T @ Bt[k].double() if k >= 0 else 0
        return y

    def norm(which: int, h: Tensor) -> Tensor:
        weight, eps, offset = given.norms[which]  # type: ignore[misc]
        return h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())

    def turned(h: Tensor) -> Tensor:
        cos, sin = (table.double()[:, :, None] for table in given.rotary or ())
        a, b = h[..., :4].chunk(2, -1)
        return torch.cat([h[..., :4] * cos + torch.cat([-b, a], -1) * sin, h[..., 4:]], -1)

    x = x.double()
    h = norm(0, x)
    q, k, v = (linear(which, h).view(ROWS, TOKENS, -1, WIDTH) for which in range(3))
    q, k = turned(norm(4, q)), turned(norm(5, k))
    keys, values = given.keys.double(), given.values.double()
    keys[given.write], values[given.write] = k.flatten(0, 1), v.flatten(0, 1)
    y = torch.zeros_like(q)
    for i, n in enumerate(given.lengths.tolist()):
        for t in range(TOKENS):
            own = given.table[i, : n - TOKENS + 1 + t]
            seen, read = (each[own].repeat_interleave(HEADS // KV, 1) for each in (keys, values))
            weights = (torch.einsum("hd,nhd->hn", q[i, t], seen) * given.scale).softmax(-1)
            y[i, t] = torch.einsum("hn,nhd->hd", weights, read)
    x = x + norm(1, linear(3, y.flatten(2)))
    h = norm(2, x)
    return x + norm(3, linear(6, F.silu(linear(4, h)) * linear(5, h)))


def test_the_output_is_that_of_the_formulas() -> None:
    given, x = operands(), normal(ROWS, TOKENS, D)
    expected = exact(given, x)
    torch.testing.assert_close(run(given, x).double(), expected, rtol=0, atol=2e-5)


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    wide, x = 600, normal(1, 2, 600)
    shapes = ((24, wide), (12, wide), (12, wide), (wide, 24), (900, wide), (900, wide), (wide, 900))
    linears = [RowLinear(normal(*shape, seed=i), None) for i, shape in enumerate(shapes)]
    small = operands()
    given = replace(small, linears=linears, norms=[None] * 6, rotary=None, table=small.table[:1])
    given = replace(given, lengths=torch.tensor([5]), write=torch.tensor([3, 4]))
    before, outputs = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outputs.append(run(given, x))
    torch.set_num_threads(before)
    assert outputs[0].isfinite().all() and torch.equal(*outputs)


def test_absent_norms_gates_biases_adapters_and_tables_are_skipped() -> None:
    given, x = operands(), normal(ROWS, TOKENS, D)
    bare = [RowLinear(one.W, None) if one else None for one in given.linears]
    bare[5] = None
    given = replace(given, linears=bare, norms=[None] * 6, rotary=None, lengths=torch.tensor([2, 2, 2]))
    given = replace(given, write=given.table[:, :2].flatten())
    W = [one.W for one in bare if one]
    q, k, v = (F.linear(x, one).view(ROWS, TOKENS, -1, WIDTH).transpose(1, 2) for one in W[:3])
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=given.scale, enable_gqa=True)
    y = x + F.linear(y.transpose(1, 2).flatten(2), W[3])
    expected = y + F.linear(F.silu(F.linear(y, W[4])), W[5])
    torch.testing.assert_close(run(given, x), expected, rtol=0, atol=1e-5)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.to(torch.float64 if t.is_floating_point() else torch.int32),
    "shorter": lambda t: t[:-1].clone(),
    "narrow rows": lambda t: t[..., :-1].clone(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "on another device": lambda t: t.to("meta"),
}
Wrong = Callable[[Tensor], Tensor]


def of_field(name: str, given: LayerOperands, wrong: Wrong) -> LayerOperands:
    changed: dict[str, Any] = {name: wrong(getattr(given, name))}
    return replace(given, **changed)


def of_linear(part: int, given: LayerOperands, wrong: Wrong) -> LayerOperands:
    one = given.linears[3]
    assert one is not None
    tensors: list[Any] = [one.W, one.bias, *one.stacks[0]]
    tensors[part] = wrong(tensors[part])
    linears = [*given.linears]
    linears[3] = RowLinear(tensors[0], tensors[1], [tuple(tensors[2:])])  # type: ignore[list-item]
    return replace(given, linears=linears)


def of_norm(given: LayerOperands, wrong: Wrong) -> LayerOperands:
    assert given.norms[5] is not None
    weight, eps, offset = given.norms[5]
    return replace(given, norms=[*given.norms[:5], (wrong(weight), eps, offset)])


def of_rotary(given: LayerOperands, wrong: Wrong) -> LayerOperands:
    assert given.rotary is not None
    cos, sin = given.rotary
    return replace(given, rotary=(cos, wrong(sin)))


FIELDS: dict[str, Callable[[LayerOperands, Wrong], LayerOperands]] = {
    **{name: partial(of_field, name) for name in ("keys", "values", "write", "table", "lengths")},
    **{f"{name} of a linear layer": partial(of_linear, i) for i, name in enumerate(("W", "bias", "A", "Bt", "index"))},
    "norm": of_norm,
    "sin": of_rotary,
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_an_operand_that_does_not_fit_is_rejected_and_nothing_is_written(field: str, wrong: str) -> None:
    given = operands()
    keys = given.keys.clone()
    with pytest.raises(ValueError):
        run(FIELDS[field](given, WRONG[wrong]), normal(ROWS, TOKENS, D))
    assert torch.equal(given.keys, keys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("write", -1), ("write", SLOTS), ("table", SLOTS), ("table", -1), ("lengths", 1), ("lengths", 6)),
        *(("index of a linear layer", -2), ("index of a linear layer", 2)),
    ],
)
def test_a_position_out_of_range_is_rejected(field: str, value: int) -> None:
    def changed(t: Tensor) -> Tensor:
        return t.clone().index_fill_(0, torch.tensor([2]), value)

    with pytest.raises(ValueError, match="integers"):
        run(FIELDS[field](operands(), changed), normal(ROWS, TOKENS, D))
