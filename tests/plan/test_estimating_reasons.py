from __future__ import annotations

from typing import Any

from lorakit.config import LoraConfig
from lorakit.plan import catalogue, count, estimating


def _reasons(name: str = "gpt2", **fields: Any) -> str:
    shape = catalogue.published(name)
    assert shape is not None
    config = LoraConfig(r=8, lora_alpha=16, **fields)
    return "\n".join(estimating.reasons(count(shape, config), config))


def test_the_c_proj_case_is_said_in_words() -> None:
    told = _reasons(target_modules=["c_attn", "c_proj"], lora_dropout=0.05)
    assert "'c_proj' matches 2 different modules, in the attention and MLP blocks" in told
    assert "attn.c_proj (768→768, 12 × Conv1D), 12,288 each; mlp.c_proj (3,072→768, 12 × Conv1D), 30,720" in told
    assert "12 × (24,576 + 12,288 + 30,720) = 811,008" in told
    assert 'Dropout has no parameters, and bias "none" adds none.' in told


def test_one_name_one_module() -> None:
    told = _reasons(target_modules=["c_attn"])
    assert "'c_attn' matches c_attn (768→2,304, 12 × Conv1D), 24,576 each." in told
    assert "different modules" not in told


def test_all_linear_lists_what_it_takes() -> None:
    told = _reasons("SmolLM2-135M", target_modules="all-linear")
    assert "matches every dense layer except the output head" in told
    assert told.count("30 × Linear") == 7


def test_parameters_besides_the_factors_are_listed() -> None:
    told = _reasons(target_modules=["c_attn"], bias="all", modules_to_save=["wpe"], use_dora=True)
    assert "transformer.wpe is a saved module with 786,432 parameters" in told
    assert "bias='all' trains 102,144 biases" in told
    assert "DoRA adds one magnitude per output of each site: 27,648 in total." in told
    assert "adds none" not in told


def test_a_rank_above_the_module_is_noted() -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    config = LoraConfig(r=1000, target_modules=["h.0.attn.c_proj"])
    assert "rank 1000 is larger" in "\n".join(estimating.reasons(count(shape, config), config))


def test_the_sum_names_the_trained_factor() -> None:
    """LoRA-FA trains B (out), and A of an embedding; MiCA trains A (in)."""
    assert "each site trains r × (in + out)" in _reasons(target_modules=["c_attn"])
    told = _reasons(target_modules=["c_attn"], init_lora_weights="mica")
    assert "12 × 6,144 = 73,728; each site trains r × in." in told
    shape, config = catalogue.published("gpt2"), LoraConfig(r=8, target_modules=["c_attn"])
    assert shape is not None
    told = "\n".join(estimating.reasons(count(shape, config, optimizer="lorafa"), config))
    assert "12 × 18,432 = 221,184; each site trains r × out" in told
