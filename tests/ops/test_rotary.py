"""Rotary embeddings: values and gradients of the fused method compared with plain PyTorch and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from lorakit.ops.reference import rotary as reference
from lorakit.ops.rotary import Rotary, check, rotate_back_, rotated


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x (B, H, T, D)."""
    return rotated(x.transpose(1, 2), rotary).transpose(1, 2)


def back(gradient: Tensor, rotary: Rotary) -> Tensor:
    """Return the gradient of x (B, H, T, D) for that of `rotate`."""
    copy = gradient.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return rotate_back_(copy, rotary).transpose(1, 2)


def tables(batch: int | None, length: int, rot: int, dtype: torch.dtype = torch.float64) -> Rotary:
    """Return angles of positions that start elsewhere in each row."""
    starts = torch.arange(1 if batch is None else batch).unsqueeze(1) * 3
    angles = (starts + torch.arange(length)).unsqueeze(-1) * 100.0 ** -(torch.arange(rot // 2) * 2 / rot).double()
    full = torch.cat((angles, angles), -1)
    full = full[0] if batch is None else full
    return Rotary(full.cos().to(dtype), full.sin().to(dtype))


@pytest.mark.parametrize(("batch", "rot"), [(None, 8), (2, 8), (2, 4), (1, 2)])
def test_value_and_gradient(batch: int | None, rot: int) -> None:
    rotary = tables(batch, 5, rot)
    if (
        rot == 4
    ):  # a table with unequal halves is still a linear map, and its transpose is the gradient  # prose-check: ok
        rotary = Rotary(torch.randn_like(rotary.cos), torch.randn_like(rotary.sin))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    expected = reference(x, rotary)
    torch.testing.assert_close(rotate(x.detach(), rotary), expected, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(back(weight, rotary), wanted, rtol=1e-12, atol=1e-12)


def test_it_is_the_formula() -> None:
    rotary = Rotary(torch.randn(5, 8), torch.randn(5, 8))
    x = torch.randn(1, 1, 5, 8)
    weight = torch.randn(1, 1, 5, 8)
    (x1, x2), (c1, c2), (s1, s2), (g1, g2) = (t.split(4, -1) for t in (x, rotary.cos, rotary.sin, weight))
    y = rotate(x, rotary)
    torch.testing.assert_close(y, torch.cat((x1 * c1 - x2 * s1, x2 * c2 + x1 * s2), -1))
    torch.testing.assert_close(back(weight, rotary), torch.cat((g1 * c1 + g2 * s2, g2 * c2 - g1 * s1), -1))


def test_as_llama() -> None:
    q, k, rotary = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), tables(2, 6, 8, torch.float32)
    for x, expected in zip((q, k), modeling_llama.apply_rotary_pos_emb(q, k, rotary.cos, rotary.sin), strict=True):
        torch.testing.assert_close(rotate(x, rotary), expected)


def test_bf16_is_as_near_the_truth_as_plain_pytorch() -> None:
    exact = torch.randn(2, 4, 64, 32).bfloat16().double()
    rotary = tables(None, 64, 32, torch.bfloat16)
    wide = Rotary(rotary.cos.double(), rotary.sin.double())
    truth = reference(exact, wide)
    ours, plain = ((f(exact.bfloat16(), rotary) - truth).abs().mean() for f in (rotate, reference))
    assert ours <= 1.0 * plain  # one rounding less


def test_strides_of_a_projection_are_taken() -> None:
    projected, rotary = torch.randn(2, 5, 3 * 8 + 5), tables(None, 5, 8, torch.float32)
    x = projected[..., :24].view(2, 5, 3, 8)
    out = rotated(x, rotary)
    assert out.is_contiguous()
    torch.testing.assert_close(out.transpose(1, 2), reference(x.transpose(1, 2), rotary))


def test_back_in_place_undoes_a_turn() -> None:
    rotary = tables(None, 5, 8)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    once = rotated(x, rotary)
    assert rotate_back_(once, rotary) is once
    torch.testing.assert_close(once, x)


@pytest.mark.parametrize(
    ("cos", "sin", "said"),
    [
        (torch.ones(4, 8), torch.ones(5, 8), r"cos must have shape \(5, rot\) or \(2, 5, rot\); got \(4, 8\)"),
        (torch.ones(3, 5, 8), torch.ones(5, 8), r"cos must have shape .*; got \(3, 5, 8\)"),
        (torch.ones(5, 10), torch.ones(5, 10), "cos: rot must be even and at most the head width 8; got 10"),
        (torch.ones(5, 7), torch.ones(5, 7), "cos: rot must be even and at most the head width 8; got 7"),
        (torch.ones(5, 8), torch.ones(5, 6), r"equal shapes; got cos \(5, 8\) and sin \(5, 6\)"),
        (torch.ones(5, 8), torch.ones(5, 8, requires_grad=True), "sin requires a gradient"),
    ],
)
def test_tables_that_do_not_fit(cos: Tensor, sin: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(torch.ones(2, 1, 5, 8), Rotary(cos, sin))
