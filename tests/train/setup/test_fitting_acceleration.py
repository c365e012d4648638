"""The lines that a run prints about its accelerated model, and about modules that are not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.ops.kernels import compiled
from lorakit.plan import Job
from lorakit.speed import Acceleration, accelerate
from lorakit.speed.admission import Skipped
from lorakit.train.setup.fitting import acceleration_lines, padding_line


def model(kind: type[transformers.PretrainedConfig] = transformers.LlamaConfig, **more: int) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = kind(**sizes, num_attention_heads=2, num_key_value_heads=2, **more)
    made: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    core.attach(made, LoraConfig(r=2, target_modules="all-linear"), allow=("partial_targets",))
    return made


def test_a_model_that_is_known_takes_two_lines() -> None:
    fast = accelerate(model())
    assert acceleration_lines(fast) == [
        f"Acceleration: {len(fast.swaps)} fused modules, loss without logits, packed sequences.",
        f"CPU kernels: {compiled.describe()}.",
    ]


def test_what_stays_as_it_is_takes_a_third() -> None:
    first, _, third = acceleration_lines(accelerate(model(transformers.MixtralConfig, num_local_experts=2)))
    assert first.startswith("Acceleration: ")
    assert third.startswith("Not accelerated: 1 × MixtralSparseMoeBlock (unknown children for a decoder layer)")
    assert "1 × ParamWrapper (dense weights: only the forward of MixtralTopKRouter sees the input of weight)" in third


@pytest.mark.parametrize("left", [(Skipped("", "Sharded", "its weights are sharded"),), ()])
def test_a_model_that_is_not_says_why(left: tuple[Skipped, ...]) -> None:
    assert acceleration_lines(Acceleration((), left, None, "its weights are sharded")) == [
        "Not accelerated: its weights are sharded."
    ]


def test_a_loss_from_logits_and_padded_rows_are_said() -> None:
    fast = accelerate(model())
    padded = Acceleration(fast.swaps, (), None, "its head has a bias", packs=False)
    assert acceleration_lines(padded)[0] == (
        f"Acceleration: {len(fast.swaps)} fused modules, loss from logits (its head has a bias), padded sequences."
    )


def test_rows_that_are_padded_although_the_plan_packs_them_are_reported() -> None:
    fast = accelerate(model())
    padded = dataclasses.replace(fast, packs=False)
    job = Job(4, 32, accelerated=True, mean_tokens=20.0)
    text = padding_line(padded, job)
    assert "padded, not packed" in text and "memory and time" in text
    assert not padding_line(fast, job)
    same: dict[str, Any]
    for same in ({"batch_rows": 1}, {"mean_tokens": None}):  # one row, or a plan that counts padding
        assert not padding_line(padded, dataclasses.replace(job, **same))
    nothing = Acceleration((), (), None, "its weights are sharded")
    assert not padding_line(nothing, job)  # another message says that nothing was accelerated
