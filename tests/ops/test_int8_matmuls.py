"""Int8 matmuls with matrix tiles (AMX) and with dot products (VNNI).

Their integers are exact, and the results equal the separate steps. A processor that has both runs all tests twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.ops import int8, int8_weight, reference
from lorakit.ops.adapted import Adapted, LowRank, factors
from lorakit.ops.int8 import Int8Inputs, reference_integer_matmul
from lorakit.ops.int8_weight import Int8Weight, input_scales, quantize_weight
from lorakit.ops.kernels import building, compiled, kernels_for
from lorakit.ops.kernels.compiled_matmuls import FEWEST_ROWS, CompiledInt8Matmuls
from lorakit.ops.kernels.gateway import Gateway
from lorakit.ops.linear import linears

KERNELS = compiled.kernels()
MATMULS = None if KERNELS is None else KERNELS.int8_matmuls
pytestmark = pytest.mark.skipif(MATMULS is None, reason="no kernels, or the processor has no int8 units")
BF16 = torch.bfloat16
BOUND = 2**-6
"""Largest difference, relative to the largest value; the sums are rounded to bf16 in another order."""


@pytest.fixture(params=[True, False], ids=["tiles", "vectors"])
def matmuls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CompiledInt8Matmuls:
    """Return the int8 matmuls with one of the units, and use them in all operations."""
    library = building.built(compiled.DTYPES[BF16]).functions
    assert library is not None
    gateway = Gateway({BF16: library})
    if request.param and not gateway.tiles:
        pytest.skip("the processor has no matrix tiles")
    made = CompiledInt8Matmuls(gateway, request.param)
    monkeypatch.setattr(compiled.kernels(), "int8_matmuls", made)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(31 * seed + sum(shape)))


def integers(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-int8_weight.LEVELS, int8_weight.LEVELS + 1, shape, generator=g).to(torch.int8)


def weights(outs: Sequence[int], width: int, kept: int) -> list[Int8Weight]:
    """Return int8 weights that share an input."""
    dense = [normal(out, width, seed=number).to(BF16) / width**0.5 for number, out in enumerate(outs)]
    gain, left_out = input_scales(normal(64, width).abs().amax(0), dense, kept)
    return [quantize_weight(W, gain, left_out) for W in dense]


def nothing(rows: int, out: int) -> tuple[Tensor, Tensor]:
    """The factors of a low-rank term of rank 0."""
    return torch.empty(rows, 0, dtype=BF16), torch.empty(out, 0, dtype=BF16)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one.double() - other.double()).abs().max() <= BOUND * other.abs().max())


SIZES = pytest.mark.parametrize("rows, width, out", [(33, 64, 64), (64, 128, 192), (95, 576, 128), (257, 192, 1088)])


@SIZES
def test_the_integers_are_exact(matmuls: CompiledInt8Matmuls, rows: int, width: int, out: int) -> None:
    q, dq, Q = integers(rows, width), integers(rows, out), integers(out, width)
    t, s, u, g = (2.0 ** torch.arange(n).remainder(5) for n in (rows, out, rows, width))
    y, total = torch.empty(rows, out, dtype=BF16), torch.empty(rows, width)
    matmuls.int8_matmul_output(q, Q, (t, s), None, (nothing(rows, out),) * 2, y)
    matmuls.int8_matmul_add(dq, Q, (u, g), None, total)
    assert torch.equal(y, (reference_integer_matmul(q, Q.t()).float() * t[:, None] * s).to(BF16))
    assert torch.equal(total, reference_integer_matmul(dq, Q).float() * u[:, None] * g)
    before = total.clone()
    matmuls.int8_matmul_add(dq, Q, (u, g), total, total)
    assert torch.equal(total, 2 * before)


@pytest.mark.parametrize("left, right", [(127, 127), (127, -127), (-127, 127), (-127, -127), (-128, -128)])
def test_the_largest_sums_do_not_saturate(matmuls: CompiledInt8Matmuls, left: int, right: int) -> None:
    q, Q = torch.full((40, 1088), left, dtype=torch.int8), torch.full((64, 1088), right, dtype=torch.int8)
    y, one = torch.empty(40, 64, dtype=BF16), torch.ones
    matmuls.int8_matmul_output(q, Q, (one(40), one(64)), None, (nothing(40, 64),) * 2, y)
    assert torch.equal(y, torch.full_like(y, 1088 * left * right))
    total = torch.empty(40, 1088)
    matmuls.int8_matmul_add(q[:, :64].contiguous(), Q, (one(40), one(1088)), None, total)
    assert torch.equal(total, torch.full_like(total, 64 * left * right))


@SIZES
@pytest.mark.parametrize("kept", [0, 3, 16])
@pytest.mark.parametrize("r", [0, 5, 16])
@pytest.mark.usefixtures("matmuls")
def test_outputs_and_gradients_equal_the_separate_steps(
    rows: int, width: int, out: int, kept: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = weights([out, 64], width, kept)
    x, h, B = normal(rows, width).to(BF16), normal(rows, r).to(BF16), normal(out, r).to(BF16)
    dys = [(normal(rows, len(W.q)).to(BF16), W) for W in group]
    plus, bias = normal(rows, width, seed=4).to(BF16), normal(out, seed=2).to(BF16)

    def both() -> list[Tensor]:
        low = (h, B) if r else (None, None)
        y = int8.output(Int8Inputs(x), group[0], bias if r else None, *low)
        return [y, int8.input_gradient(dys, plus.clone()), int8.input_gradient(dys[:1], None)]

    together = both()
    monkeypatch.setattr(compiled.kernels(), "int8_matmuls", None)
    assert all(close(one, other) for one, other in zip(together, both(), strict=True))


@pytest.mark.usefixtures("matmuls")
def test_a_group_equals_its_reference_in_value_and_gradient() -> None:
    group = []
    for number, (W, r) in enumerate(zip(weights([128, 64, 192], 192, 16), (2, 0, 16), strict=True)):
        A, B = (normal(*shape, seed=5 + number).requires_grad_() for shape in ((r or 1, 192), (len(W.q), r or 1)))
        bias = normal(len(W.q), seed=9).to(BF16) if number % 2 == 0 else None
        group.append(Adapted(W, bias, LowRank(A, B, 0.5, 0.0) if r else None))
    results = []
    for function in (linears, reference.linear):
        x = normal(70, 192, seed=1).to(BF16).requires_grad_()
        ys = function(x, group)
        gradients = [normal(*y.shape, seed=3 + number).to(BF16) for number, y in enumerate(ys)]
        inputs = [x, *(t for t in factors(group) if t is not None)]
        results.append([*ys, *torch.autograd.grad(list(ys), inputs, gradients)])
    assert all(close(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.usefixtures("matmuls")
def test_the_number_of_threads_changes_no_bit() -> None:
    (W,) = weights([192], 576, 16)
    x, dy = normal(300, 576).to(BF16), normal(300, 192).to(BF16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([int8.output(Int8Inputs(x), W), int8.input_gradient([(dy, W)])])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for made in results[1:] for one, other in zip(results[0], made, strict=True))


@pytest.mark.usefixtures("matmuls")
def test_bf16_matmuls_of_pytorch_between_the_calls_stay_right() -> None:
    """PyTorch uses the same registers, and sets them up once per thread."""
    (W,) = weights([192], 576, 16)
    x, dense = normal(64, 576).to(BF16), normal(576, 320).to(BF16)
    expected, y = x @ dense, int8.output(Int8Inputs(x), W)
    for _ in range(3):
        assert torch.equal(int8.output(Int8Inputs(x), W), y)
        assert torch.equal(x @ dense, expected)


@pytest.mark.usefixtures("matmuls")
def test_a_row_with_a_nan_stays_visible_and_alone() -> None:
    (W,) = weights([128], 192, 3)
    x = normal(40, 192).to(BF16)
    clean = int8.output(Int8Inputs(x), W)
    x[7, 5] = torch.nan
    y = int8.output(Int8Inputs(x), W)
    assert y[7].isnan().all()
    assert torch.equal(y[:7], clean[:7]) and torch.equal(y[8:], clean[8:])


def test_only_sizes_that_fill_tiles_are_supported(matmuls: CompiledInt8Matmuls) -> None:
    rows = torch.empty(FEWEST_ROWS, 64, dtype=torch.int8)
    assert matmuls.supports(rows, integers(64, 64))
    assert not matmuls.supports(rows[1:], integers(64, 64))
    assert not matmuls.supports(rows, integers(64, 96))
    assert not matmuls.supports(rows, integers(100, 64))


def test_wrong_tensors_are_rejected(matmuls: CompiledInt8Matmuls) -> None:
    q, Q, one = integers(40, 64), integers(128, 64), torch.ones
    none, y = nothing(40, 128), torch.empty(40, 128, dtype=BF16)
    dx, kept = torch.zeros(40, 64, dtype=BF16), torch.tensor([64])
    with pytest.raises(ValueError, match="q"):
        matmuls.int8_matmul_output(q[:, :32], Q, (one(40), one(128)), None, (none, none), y)
    with pytest.raises(ValueError, match="multiples"):
        matmuls.int8_matmul_output(q, Q[:100], (one(40), one(100)), None, (none, none), y)
    for number, name in enumerate(("B", "columns")):
        terms = [none, none]
        terms[number] = normal(40, 4).to(BF16), normal(128, 3).to(BF16)
        with pytest.raises(ValueError, match=name):
            matmuls.int8_matmul_output(q, Q, (one(40), one(128)), None, (terms[0], terms[1]), y)
    with pytest.raises(ValueError, match="kept"):
        matmuls.int8_matmul_input_gradient(integers(40, 128), Q, (one(40), one(64)), torch.zeros(40, 1), kept, None, dx)


def test_the_kernels_are_used_here(matmuls: CompiledInt8Matmuls) -> None:
    """Otherwise, the tests above would compare the separate steps with themselves."""
    found = kernels_for(torch.ones(2, 3, dtype=BF16))
    (W,) = weights([64], 64, 16)
    assert found is not None and int8._matmuls(found, BF16, integers(40, 64), W) is matmuls


@pytest.mark.parametrize("rows", [40, 64])
@pytest.mark.parametrize("r, k", [(0, 16), (16, 0), (3, 0), (0, 1), (8, 5), (16, 16), (17, 15), (40, 16)])
def test_low_rank_terms_of_any_rank_are_added(matmuls: CompiledInt8Matmuls, rows: int, r: int, k: int) -> None:
    q, Q, one = integers(rows, 64), integers(128, 64), torch.ones
    h, B, kept, columns = (
        normal(*size, seed=n).to(BF16) for n, size in enumerate(((rows, r), (128, r), (rows, k), (128, k)))
    )
    y, apart = torch.empty(rows, 128, dtype=BF16), torch.empty(rows, 128, dtype=BF16)
    scales = one(rows), one(128) / 64
    matmuls.int8_matmul_output(q, Q, scales, None, ((h, B), (kept, columns)), y)
    low = h.float() @ B.float().t() + kept.float() @ columns.float().t()
    assert close(y, reference_integer_matmul(q, Q.t()) / 64 + low)
    wider = torch.cat((h, normal(rows, 5).to(BF16)), 1)[:, :r]  # rows at a distance
    matmuls.int8_matmul_output(q, Q, scales, None, ((wider, B), (kept, columns)), apart)
    assert torch.equal(apart, y)


@pytest.mark.parametrize("r", [1, 5, 16])
def test_an_activation_in_any_layout_takes_the_kernel(
    matmuls: CompiledInt8Matmuls, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters without dropout share a matmul, so that each activation is a part of a wider matrix."""
    calls, run = list[str](), matmuls.int8_matmul_output

    def noted(*given: Any) -> None:
        calls.append("output")
        run(*given)

    monkeypatch.setattr(matmuls, "int8_matmul_output", noted)
    (W,), x = weights([128], 64, 16), normal(40, 64, seed=1).to(BF16)
    h, B = normal(40, r, seed=2).to(BF16), normal(128, r, seed=3).to(BF16)
    layouts = [(h, B), (torch.cat((h, h, h), 1)[:, r : 2 * r], B), (h.t().contiguous().t(), B.t().contiguous().t())]
    found = [int8.output(Int8Inputs(x), W, None, *one) for one in layouts]
    assert len(calls) == 3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Inexact(CompiledInt8Matmuls):
    """Int8 matmuls that are wrong in one direction."""

    def int8_matmul_add(
        self, q: Tensor, Q: Tensor, scales: tuple[Tensor, Tensor], partial: Tensor | None, total: Tensor
    ) -> None:
        super().int8_matmul_add(q, Q, scales, partial, total)
        total[-1, -1] += 1


def test_kernels_that_are_not_exact_are_not_used(matmuls: CompiledInt8Matmuls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8.why_no_int8_matmuls.__wrapped__() == ""
    monkeypatch.setattr(compiled.kernels(), "int8_matmuls", Inexact(matmuls._gateway, matmuls.tiles))
    reason = int8.why_no_int8_matmuls.__wrapped__()
    assert "wrong" in reason
    monkeypatch.setattr(int8, "why_no_int8_matmuls", lambda: reason)
    (W,) = weights([64], 64, 16)
    assert int8._matmuls(kernels_for(torch.ones(2, 3, dtype=BF16)), BF16, integers(40, 64), W) is None
