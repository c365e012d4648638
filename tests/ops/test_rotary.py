"""Rotary embeddings: values and gradients of the fused method compared with plain PyTorch and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from lorakit.ops.reference import rotary as reference
from lorakit.ops.rotary import Rotary, rotate, rotate_back_, rotated

PAIRS = ["half", "interleaved"]


def tables(batch: int | None, length: int, rot: int, dtype: torch.dtype = torch.float64, pairs: str = "half") -> Rotary:
    """Return angles of positions that start elsewhere in each row."""
    starts = torch.arange(1 if batch is None else batch).unsqueeze(1) * 3
    angles = (starts + torch.arange(length)).unsqueeze(-1) * 100.0 ** -(torch.arange(rot // 2) * 2 / rot).double()
    full = torch.cat((angles, angles), -1) if pairs == "half" else angles.repeat_interleave(2, -1)
    full = full[0] if batch is None else full
    return Rotary(full.cos().to(dtype), full.sin().to(dtype), pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("batch", "rot"), [(None, 8), (2, 8), (2, 4), (1, 2)])
def test_value_and_gradient(pairs: str, batch: int | None, rot: int) -> None:
    rotary = tables(batch, 5, rot, pairs=pairs)
    if (
        rot == 4
    ):  # a table with unequal halves is still a linear map, and its transpose is the gradient  # prose-check: ok
        rotary = Rotary(torch.randn_like(rotary.cos), torch.randn_like(rotary.sin), rotary.pairs)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    out, expected = rotate(x, rotary), reference(x, rotary)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (grad,), (wanted,) = (torch.autograd.grad((y * weight).sum(), x) for y in (out, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda y: rotate(y, rotary), x)


def test_it_is_the_formula() -> None:
    rotary = Rotary(torch.randn(5, 8), torch.randn(5, 8))
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    weight = torch.randn(1, 1, 5, 8)
    (x1, x2), (c1, c2), (s1, s2), (g1, g2) = (t.split(4, -1) for t in (x, rotary.cos, rotary.sin, weight))
    y = rotate(x, rotary)
    torch.testing.assert_close(y, torch.cat((x1 * c1 - x2 * s1, x2 * c2 + x1 * s2), -1))
    (grad,) = torch.autograd.grad(y, x, weight)
    torch.testing.assert_close(grad, torch.cat((g1 * c1 + g2 * s2, g2 * c2 - g1 * s1), -1))


def test_as_llama_and_as_cohere() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    for module, pairs in ((modeling_llama, "half"), (modeling_cohere, "interleaved")):
        rotary = tables(2, 6, 8, torch.float32, pairs)
        for x, expected in zip((q, k), module.apply_rotary_pos_emb(q, k, rotary.cos, rotary.sin), strict=True):
            torch.testing.assert_close(rotate(x, rotary), expected)


@pytest.mark.parametrize("pairs", PAIRS)
def test_bf16_is_as_near_the_truth_as_plain_pytorch(pairs: str) -> None:
    exact = torch.randn(2, 4, 64, 32).bfloat16().double()
    rotary = tables(None, 64, 32, torch.bfloat16, pairs)
    wide = Rotary(rotary.cos.double(), rotary.sin.double(), rotary.pairs)
    truth = reference(exact, wide)
    ours, plain = ((f(exact.bfloat16(), rotary) - truth).abs().mean() for f in (rotate, reference))
    assert ours <= 1.0 * plain  # one rounding less


def test_strides_of_a_projection_are_taken_and_nothing_of_x_is_kept() -> None:
    projected = torch.randn(2, 5, 3 * 8, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = rotate(projected.view(2, 5, 3, 8).transpose(1, 2), tables(None, 5, 8, torch.float32))
    assert out.transpose(1, 2).is_contiguous()
    assert kept == []


def test_back_in_place_undoes_a_turn_and_leaves_the_gradient_that_came_in() -> None:
    rotary = tables(None, 5, 8)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    once = rotated(x, rotary)
    assert rotate_back_(once, rotary) is once
    torch.testing.assert_close(once, x)
    leaf = torch.randn(1, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(1, 3, 5, 8, dtype=torch.float64)
    before = incoming.clone()
    rotate(leaf, rotary).backward(incoming)
    assert torch.equal(incoming, before)


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
        rotate(torch.ones(2, 1, 5, 8), Rotary(cos, sin))
