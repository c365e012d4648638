"""The planned size of the optimizer state is that of the tensors that the optimizer holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import choices, core
from lorakit.config import LoraConfig
from lorakit.hub import shape_of_module
from lorakit.plan import Job, count, estimate
from lorakit.plan.optimizer_state import OPTIMIZERS, optimizer_state
from lorakit.train.loop import optimizer as built
from lorakit.train.settings.settings import TrainSettings

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"r": 4, "target_modules": "all-linear"},
    "large": {"r": 64, "target_modules": ["down_proj", "q_proj"], "rank_pattern": {"q_proj": 3}},
    "dora": {"r": 64, "target_modules": ["up_proj"], "use_dora": True},
    "smaller A": {"r": 64, "target_modules": ["down_proj"], "use_qalora": True, "qalora_group_size": 2},
    "bias of B": {"r": 64, "target_modules": ["up_proj"], "lora_bias": True},
    "embeddings": {"r": 8, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


def test_every_optimizer_can_be_planned_and_is_documented() -> None:
    assert list(choices.OPTIMIZERS) == list(OPTIMIZERS) == list(built.OPTIMIZERS)
    page = (Path(__file__).parents[2] / "docs/optimizers.md").read_text()
    assert {*OPTIMIZERS} == {*re.findall(r"`--optimizer (\w+)`", page)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("which", CONFIGS)
def test_planned_is_held(tiny_llama: Any, which: str, optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9")
    tiny_llama.float()
    config, job = LoraConfig(**CONFIGS[which]), Job(optimizer=optimizer, dtype="float32")
    shape = shape_of_module(tiny_llama, "tiny", "here")
    planned = estimate(shape, config, job).lora
    formula, size = optimizer_state(count(shape, config, optimizer=optimizer), optimizer, 4)
    core.attach(tiny_llama, config, "default")
    settings = TrainSettings(model="m", data="d", output_dir="o", optimizer=optimizer)
    named, made = built.build_optimizer(tiny_llama, "default", settings)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    tensors = {
        t.data_ptr(): t for _, p in named for t in made.state[p].values() if isinstance(t, torch.Tensor) and t.ndim
    }
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert planned.memory.bytes_of("optimizer") == size == held
    assert eval(formula.replace("×", "*").replace(",", "").replace("blocks", "")) == held
    assert planned.resumable_bytes == planned.saved_bytes + held


def test_saved_modules_in_bf16_have_moments_in_bf16_unless_they_are_in_8_bits(tiny_llama: Any) -> None:
    config = LoraConfig(**CONFIGS["head"])
    counted = count(shape_of_module(tiny_llama, "tiny", "here"), config)
    plain, factors = counted.copied, counted.factors
    assert optimizer_state(counted, "adamw", 2)[1] == 2 * (4 * factors + 2 * plain)
    assert optimizer_state(counted, "muon", 2)[1] == 4 * factors + 2 * 2 * plain
    assert optimizer_state(counted, "adamw8bit", 2) == optimizer_state(counted, "adamw8bit", 4)
