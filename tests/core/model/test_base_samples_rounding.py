"""Differences of two samples that rounding explains, and differences that it does not."""

import pytest
import torch

from lorakit.core.model.base_samples import agree_after_rounding, equal

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def drawn(size: float = 1.0, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, generator=generator) * size).double()


def through(values: torch.Tensor, *dtypes: torch.dtype) -> torch.Tensor:
    for dtype in dtypes:
        values = values.to(dtype)
    return values.double()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e5], ids=str)
def test_one_source_in_fp16_and_in_bf16(size: float) -> None:
    half, brain = through(drawn(size), FP16), through(drawn(size), BF16)
    assert agree_after_rounding(half, brain) and agree_after_rounding(brain, half)
    assert not equal(through(half, BF16), brain) or size > 1e4  # at a tie the two differ
    for wrong in (brain * (1 + 2**-7), brain * 1.02, -brain):
        assert not agree_after_rounding(half, through(wrong, BF16))


@pytest.mark.parametrize("way", [(BF16,), (FP16,), (FP16, BF16), (BF16, FP16), (BF16, FP32), (FP16, FP32)], ids=str)
def test_rounded_on_the_way(way: tuple[torch.dtype, ...]) -> None:
    values = drawn(0.02)
    assert agree_after_rounding(values, through(values, *way)) and agree_after_rounding(through(values, *way), values)
    noisy = through(values * (1 + 0.002 * drawn().flip(0)), *way)
    assert not agree_after_rounding(values, noisy) and not agree_after_rounding(noisy, values)


def test_a_single_step_more_is_not_rounding() -> None:
    values = through(drawn(0.02, 64), BF16)
    other = values.clone()
    other[5] *= 1 + 2**-7
    assert not agree_after_rounding(values, other) and not agree_after_rounding(other, values)


def test_numbers_that_are_none() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 70000.0], dtype=torch.float64)
    assert (
        equal(odd, odd)
        and agree_after_rounding(odd, through(odd, FP16))
        and agree_after_rounding(through(odd, BF16), odd)
    )
    assert agree_after_rounding(through(odd, FP16), through(odd, BF16))
    assert not agree_after_rounding(through(odd, FP16), through(-odd, BF16))
    assert not equal(odd, odd[:-1]) and not agree_after_rounding(odd, odd[:-1])
    assert not agree_after_rounding(odd[1:2], torch.tensor([1.0], dtype=torch.float64))
