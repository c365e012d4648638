"""Each statement of docs/math.md, "Common misconceptions", as a small proof."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.plan import Job, catalogue, count, estimate

from ..loading import load

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "alpha_and_learning_rate.py"
TAUGHT: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["c_attn", "c_proj"]}


@pytest.fixture(scope="module")
def experiment() -> Any:
    return load("examples/alpha_and_learning_rate.py")


def test_under_adam_alpha_multiplies_the_rate_of_b(experiment: Any) -> None:
    _, doubled = experiment.train("Adam", 16, 1, 1)
    torch.testing.assert_close(experiment.train("Adam", 8, 1, 2)[1], doubled, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(experiment.train("Adam", 8, 2, 2)[1], doubled, rtol=0.05)


def test_under_sgd_its_square_does(experiment: Any) -> None:
    _, doubled = experiment.train("SGD", 16, 1, 1)
    torch.testing.assert_close(experiment.train("SGD", 8, 1, 4)[1], doubled, rtol=1e-9, atol=1e-12)
    for times_A, times_B in ((2, 2), (1, 2), (4, 4)):
        assert not torch.allclose(experiment.train("SGD", 8, times_A, times_B)[1], doubled, rtol=0.05)


def test_after_training_alpha_scales_what_was_learned(tmp_path: Path) -> None:
    """No rate can do that: the same A and B, another alpha in the config, and the delta is another one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    plain = model(x).detach()
    core.attach(model, LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False))
    once = model(x).detach() - plain
    core.sites(model)[0].layer.scaling["default"] *= 2  # what a config with alpha 8 gives
    torch.testing.assert_close(model(x).detach() - plain, 2 * once, rtol=1e-4, atol=1e-6)


def test_dropout_has_no_parameters_and_bias_none_adds_none() -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    counts = {p: count(shape, LoraConfig(**{**TAUGHT, "lora_dropout": p})).trainable for p in (0.0, 0.05, 0.5)}
    assert set(counts.values()) == {811_008}
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert core.attach(model, LoraConfig(**TAUGHT)).trainable_parameters == 811_008
    attention_alone = count(shape, LoraConfig(**{**TAUGHT, "target_modules": ["c_attn", "attn.c_proj"]}))
    assert attention_alone.trainable == 442_368
    assert 811_008 - 442_368 == 12 * 8 * (3072 + 768)  # the MLP's c_proj, which the name takes too


@pytest.mark.costly(cases=0)
def test_the_checkpoint_of_nine_megabytes_is_the_adapter_three_times() -> None:
    """`torch.save` of adapter and AdamW state: 9.8 MB, which a program that divides by 1024² calls 9.4."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=8))
    core.attach(model, LoraConfig(**TAUGHT))
    named = core.trainable_parameters(model)
    optimizer = torch.optim.AdamW([p for _, p in named], 1e-3)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    file = io.BytesIO()
    torch.save({"model": {name: p.detach() for name, p in named}, "optimizer": optimizer.state_dict()}, file)
    assert file.tell() == pytest.approx(3 * 4 * 811_008, rel=0.01)
    assert round(file.tell() / 2**20, 1) == 9.4


def test_training_a_hundredth_of_the_numbers_is_not_a_hundred_times_faster() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    plan = estimate(shape, LoraConfig(r=8, target_modules="all-linear"), Job(4, 256))
    assert plan.counted.share < 0.02
    assert plan.lora.flops.total / plan.full.flops.total == pytest.approx(0.69, abs=0.03)


def test_activations_stay() -> None:
    """LoRA reduces gradients and optimizer state, but hardly the activations that are saved for the backward pass."""
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    plan = estimate(shape, LoraConfig(r=8, target_modules="all-linear"), Job(4, 256))
    lora, full = plan.lora.memory, plan.full.memory
    assert lora.bytes_of("optimizer") + lora.bytes_of("gradients") < 0.03 * (
        full.bytes_of("optimizer") + full.bytes_of("gradients")
    )
    assert lora.bytes_of("activations") > 0.7 * full.bytes_of("activations")


def test_a_perplexity_near_one_can_come_from_noise() -> None:
    """Random tokens have no pattern, yet their perplexity falls to 1; that of other random tokens does not improve."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.4, **sizes))
    core.attach(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=0)
    learned, other = torch.randint(0, 64, (2, 2, 16))
    optimizer = torch.optim.Adam([p for _, p in core.trainable_parameters(model)], lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(learned, labels=learned).loss
        loss.backward()
        optimizer.step()
    assert math.exp(loss.item()) < 1.1
    assert model(other, labels=other).loss.item() > math.log(64)  # worse than guessing
