"""LoRA-FA: the frozen factors, the corrected gradient, and the optimizer's AdamW steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.optimizers import LoraFA, Pair, corrected_gradient, freeze_factors, inverse_gram
from lorakit.errors import AdapterError, ConfigError


def test_the_corrected_step_is_the_nearest_that_a_frozen_a_allows() -> None:
    torch.manual_seed(0)
    A, G, s = torch.randn(3, 8), torch.randn(5, 8), 1.7
    g = s * G @ A.T  # the gradient of B where that of W is G
    pair = Pair(nn.Parameter(torch.zeros(5, 3)), A, s)
    X = corrected_gradient(g, pair, inverse_gram(pair))
    solved = torch.linalg.lstsq((s * A).T, G.T).solution.T
    torch.testing.assert_close(X, solved, rtol=1e-4, atol=1e-5)
    B = torch.randn(5, 3)
    g = s * B.T @ G
    pair = Pair(nn.Parameter(torch.zeros(3, 8)), B, s, trained_is_A=True)
    X = corrected_gradient(g, pair, inverse_gram(pair))
    torch.testing.assert_close(X, torch.linalg.lstsq(s * B, G).solution, rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_is_corrected_group_by_group() -> None:
    torch.manual_seed(0)
    A, g = torch.randn(4, 3, 2, 2), torch.randn(6, 2, 1, 1)  # r 4, two groups of two ranks, three outputs each
    pair = Pair(nn.Parameter(torch.zeros_like(g)), A, 2.0)
    assert pair.blocks == 2
    found = corrected_gradient(g, pair, inverse_gram(pair))
    for group in range(2):
        rows = A[2 * group : 2 * group + 2].flatten(1)
        expected = g[3 * group : 3 * group + 3, :, 0, 0] @ torch.linalg.inv(rows @ rows.T) / 4
        torch.testing.assert_close(found[3 * group : 3 * group + 3, :, 0, 0], expected)


def test_experts_are_corrected_one_by_one() -> None:
    torch.manual_seed(0)
    A, g = (
        torch.randn(6, 8),
        torch.randn(5, 6),
    )  # three experts of rank 2: A expert by expert, B with the expert fastest
    pair = Pair(nn.Parameter(torch.zeros(5, 6)), A, 2.0, experts=3)
    found = corrected_gradient(g, pair, inverse_gram(pair)).reshape(5, 2, 3)
    for expert in range(3):
        rows = A[2 * expert : 2 * expert + 2]
        expected = g.reshape(5, 2, 3)[..., expert] @ torch.linalg.inv(rows @ rows.T) / 4
        torch.testing.assert_close(found[..., expert], expected)


def test_a_singular_a_and_low_precision_are_taken() -> None:
    B = nn.Parameter(torch.zeros(3, 2))
    assert torch.isfinite(inverse_gram(Pair(B, torch.ones(2, 4), 1.0))).all()
    assert inverse_gram(Pair(B, torch.randn(2, 4, dtype=torch.bfloat16), 1.0)).dtype == torch.float32
    g, pair = torch.ones(3, 2, dtype=torch.bfloat16), Pair(B, torch.eye(2), 1.0)
    assert corrected_gradient(g, pair, inverse_gram(pair)).dtype == torch.bfloat16


def test_what_is_frozen_is_what_does_not_begin_at_zero(tiny_llama: Any) -> None:
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    core.attach(tiny_llama, LoraConfig(r=3, target_modules=["q_proj"]), "other")
    pairs = freeze_factors(tiny_llama, "default")
    trained = {name for name, _ in core.trainable_parameters(tiny_llama, "default")}
    assert {name.rpartition(".lora_")[2].split(".")[0] for name in trained} == {"embedding_A", "B"}
    assert [(p.trained_is_A, tuple(p.trained.shape), p.scale) for p in pairs] == [
        (True, (2, 512), 4.0),
        (False, (32, 2), 4.0),
        (False, (32, 2), 4.0),
    ]
    assert any(".lora_A.other" in name for name, _ in core.trainable_parameters(tiny_llama, "other"))
    assert len(freeze_factors(tiny_llama)) == 5
    with pytest.raises(AdapterError, match="nobody"):
        freeze_factors(tiny_llama, "nobody")


def test_an_adapter_that_trains_a_alone_is_refused(tiny_llama: Any) -> None:
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in tiny_llama.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="LoRA-FA freezes the only factor"):
        freeze_factors(tiny_llama)


def test_plain_tensors_take_adamw_steps() -> None:
    """Tensors that are not in a pair, with the decay after the step: torch's AdamW except for ε."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4))
    twin = nn.Parameter(p.detach().clone())
    ours, theirs = LoraFA([p], lr=0.1, eps=0.0), torch.optim.AdamW([twin], lr=0.1, eps=0.0, weight_decay=0.0)
    for step in range(5):
        p.grad = torch.randn(4, generator=torch.Generator().manual_seed(step))
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, twin)
    decayed = nn.Parameter(torch.ones(3))
    decayed.grad = torch.zeros(3)
    LoraFA([decayed], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(decayed.detach(), torch.full((3,), 0.95))


def test_the_inverse_follows_a_changed_a() -> None:
    A, B = torch.randn(2, 5), nn.Parameter(torch.zeros(3, 2))
    optimizer = LoraFA([B], [Pair(B, A, 1.0)], lr=0.1, betas=(0.0, 0.0), eps=1.0)
    for factor in (1.0, 2.0, 1.0):
        A.mul_(factor)
        before, B.grad = B.detach().clone(), torch.ones(3, 2)
        optimizer.step()
        corrected = torch.ones(3, 2) @ torch.linalg.inv(A @ A.T)
        step = -0.1 * corrected / (corrected.abs() + 1.0)  # no momentum: each step shows its own gradient
        torch.testing.assert_close(B.detach() - before, step, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-9}])
def test_numbers_out_of_range(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="must be at least 0") as error:
        LoraFA([nn.Parameter(torch.ones(1))], **wrong)
    assert str(error.value.field).startswith(next(iter(wrong)))


class Kinds(nn.Module):
    """A grouped convolution, attention and experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, 8, 8))
        self.experts.forward = lambda x: torch.einsum("bti,eoi->bto", x, self.experts.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).transpose(1, 2)
        return self.attention(h, h, h)[0]


def test_other_kinds_take_steps(tiny_llama: Any) -> None:
    model = Kinds()
    core.attach(model, LoraConfig(r=4, target_modules=["conv", "attention"]))
    pairs = freeze_factors(model)
    assert sorted(p.blocks for p in pairs) == [1, 1, 2]
    named = core.trainable_parameters(model)
    assert all(".lora_B" in name for name, _ in named)
    optimizer = LoraFA([p for _, p in named], pairs, lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4, 9)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(bool(p.any()) for _, p in named)
