"""Input scales of int8 matmuls give the same base again, and the fingerprint stays that of the original weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.int8.quantized_base import int8_scales, quantize_base, quantize_with_scales, record_original_base
from lorakit.core.model.index import AdapterIndex
from lorakit.core.quantization.int8_linear import Int8Linear
from lorakit.errors import ModelError

BATCHES = [{"input_ids": torch.arange(40).reshape(2, 20)}]
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def int8_layers(model: torch.nn.Module) -> dict[str, Int8Linear]:
    index = AdapterIndex.of(model)
    return {path: layer for path in index.modules if isinstance(layer := index.base(path), Int8Linear)}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_gpt2"])
def test_the_same_scales_give_the_same_bits(architecture: str, adapted: bool, request: pytest.FixtureRequest) -> None:
    import copy

    model: Any = request.getfixturevalue(architecture).requires_grad_(False)
    other = copy.deepcopy(model)
    quantize_base(model, BATCHES)
    scales = int8_scales(model)
    if adapted:
        core.attach(other, LoraConfig(r=4, target_modules="all-linear"))
    quantize_with_scales(other, scales)
    first, second = int8_layers(model), int8_layers(other)
    assert set(first) == set(second)
    for path, layer in first.items():
        for one, two in zip(layer.parameters(), second[path].parameters(), strict=True):
            assert torch.equal(one, two), path
    if architecture == "tiny_llama":
        at = "model.layers.0.self_attn."
        assert second[f"{at}q_proj"].gain is second[f"{at}k_proj"].gain
        assert f"{at}q_proj,{at}k_proj,{at}v_proj.gain" in scales


def test_scales_of_another_model_change_nothing(tiny_llama: Any, tiny_gpt2: Any) -> None:
    quantize_base(tiny_gpt2.requires_grad_(False), BATCHES)
    with pytest.raises(ModelError, match="do not fit") as found:
        quantize_with_scales(tiny_llama, int8_scales(tiny_gpt2))
    assert found.value.field == "base_matmul" and not int8_layers(tiny_llama)


def test_the_fingerprint_is_that_of_the_original_weights(tiny_llama: Any) -> None:
    core.attach(tiny_llama, CONFIG)
    before = core.fingerprint(tiny_llama)
    record_original_base(tiny_llama)
    quantize_base(tiny_llama, BATCHES)
    assert core.fingerprint(tiny_llama) == before
