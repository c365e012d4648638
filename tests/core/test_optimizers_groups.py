"""The role of each trained tensor, and its learning rate by LoRA+ and by pattern."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.optimizers import Rates, rates_by_name, trained_parts
from lorakit.errors import ConfigError


@pytest.fixture
def parts(tiny_llama: Any) -> Any:
    saved = ["model.norm", "o_proj"]
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True, modules_to_save=saved))
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["embed_tokens"]), "words")
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["k_proj"]), "other")
    return [*trained_parts(tiny_llama, "default"), *trained_parts(tiny_llama, "words")]


def test_roles_and_sites(parts: Any) -> None:
    found = {re.sub(r"[.](default|words)", "", part.name): (part.role, part.site) for part in parts}
    layer = "model.layers.0."
    site, saved = layer + "self_attn.q_proj", layer + "self_attn.o_proj"
    assert found["model.embed_tokens.lora_embedding_A"] == ("embedding", "model.embed_tokens")
    assert found[f"{site}.lora_A.weight"] == ("A", site)
    assert found[f"{site}.lora_B.weight"] == ("B", site)
    assert found[f"{site}.lora_magnitude_vector.weight"] == ("vector", site)
    assert found[f"{saved}.modules_to_save.weight"] == ("whole", saved)
    assert found["model.norm.modules_to_save.weight"] == ("vector", "model.norm")
    assert not any("k_proj" in name for name in found)


def rates(parts: Any, **given: Any) -> dict[tuple[str, str], float]:
    by_name = rates_by_name(parts, Rates(0.01, **given))
    assert set(by_name) == {part.name for part in parts}
    return {(part.site.rpartition(".")[2], part.role): by_name[part.name] for part in parts}


def test_rates(parts: Any) -> None:
    assert set(rates(parts).values()) == {0.01}
    plus = rates(parts, b_ratio=8.0, embedding=1e-6)
    assert plus["q_proj", "A"] == 0.01
    assert plus["q_proj", "B"] == plus["q_proj", "vector"] == plus["norm", "vector"] == 0.08
    assert plus["embed_tokens", "embedding"] == 1e-6
    assert plus["o_proj", "whole"] == 0.01
    by_pattern = rates(
        parts, b_ratio=2.0, embedding=1e-6, patterns={"q_proj": 1.0, r".*_proj": 3.0, "embed_tokens": 5.0}
    )
    assert (by_pattern["q_proj", "A"], by_pattern["q_proj", "B"]) == (1.0, 2.0)  # the first that fits wins
    assert (by_pattern["up_proj", "A"], by_pattern["o_proj", "whole"]) == (3.0, 3.0)
    assert by_pattern["embed_tokens", "embedding"] == 5.0
    assert by_pattern["norm", "vector"] == 0.02


def test_patterns_that_fit_nothing_are_named(parts: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        rates(parts, patterns={"q_pro": 1.0})
    assert str(caught.value) == (
        "learning_rate_pattern key 'q_pro' matches none of the adapted modules (8 in total); "
        "nearest: q_proj, o_proj, up_proj."
    )
    with pytest.raises(ConfigError, match="is not a valid regular expression"):
        rates(parts, patterns={"(": 1.0})


def test_biases_are_vectors(tiny_gpt2: Any) -> None:
    core.attach(tiny_gpt2, LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only"))
    found = {(part.role, part.site) for part in trained_parts(tiny_gpt2) if part.name.endswith("bias")}
    assert found == {("vector", f"transformer.h.{i}.attn.c_attn") for i in (0, 1)}
