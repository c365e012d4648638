"""Quantized bases: the table's names, the bytes of weights, and what their matmuls save."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from lorakit.choices import STORED
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.plan import Job, activations, catalogue, count, estimate
from lorakit.plan.memory import logits_bytes
from lorakit.plan.quantized import STORAGES, Quantization, quantized_sites, storage_named, stored, stored_as

CONFIG = LoraConfig(r=16, target_modules="all-linear")


def shape_of(name: str) -> Any:
    shape = catalogue.published(name)
    assert shape is not None
    return shape


def test_the_words_are_those_of_the_settings() -> None:
    assert tuple(storage.name for storage in STORAGES) == STORED
    with pytest.raises(ConfigError, match=r"quantization is 'nf5'; it must be one of .* Did you mean nf4\?"):
        storage_named("nf5")
    with pytest.raises(ConfigError, match="quantization is 'q'"):
        Job(quantization="q")


def test_double_quantization_is_of_the_storages_that_have_it() -> None:
    assert Quantization("nf4").double and not Quantization("int8").double and not Quantization("fp4", False).double
    assert (
        Quantization("nf4").description() == "nf4 with double quantization"
        and Quantization("hqq4").description() == "hqq4"
    )
    assert stored_as(None) is None and stored_as("nf4", False) == Quantization("nf4", False)


@pytest.mark.parametrize(
    ("name", "double", "size"),
    [
        ("nf4", False, 576 * 576 // 2 + 4 * 5184 + 64),
        ("nf4", True, 576 * 576 // 2 + 5184 + 4 * 21 + 64 + 4 + 1024),
        ("int8", False, 576 * 576 + 4 * 576),
        ("int8-torchao", False, 576 * 576 + 5 * 576),
        ("hqq4", False, 576 * 576 // 2 + 2 * 2 * 5184),
        ("hqq8", False, 576 * 576 + 2 * 2 * 5184),
    ],
)
def test_bytes_of_one_weight(name: str, double: bool, size: int) -> None:
    assert storage_named(name).size(576, 576, 2, double) == size


def test_bytes_of_a_base() -> None:
    planned = estimate(shape_of("SmolLM2-135M"), CONFIG, Job(4, 256, quantization="nf4"))
    line = planned.lora.memory.lines[0]
    assert line.formula == "2 × 28,346,688 + 54,998,520 (nf4 of 106,168,320)"
    assert line.size_bytes == 2 * 28_346_688 + 54_998_520 and line.equation == 28
    plain = estimate(shape_of("SmolLM2-135M"), CONFIG, Job(4, 256))
    assert planned.lora.memory.peak_bytes < plain.lora.memory.peak_bytes - 150_000_000
    assert planned.full.memory.peak_bytes == plain.full.memory.peak_bytes  # full fine-tuning has no quantized base
    assert "every matmul dequantizes its weight first" in " ".join(planned.notes)


def test_head_and_embedding_stay_as_they_are() -> None:
    paths = {site.path for site in quantized_sites(shape_of("gpt2"), storage_named("nf4"))}
    assert len(paths) == 48 and not any("wte" in path or "lm_head" in path for path in paths)
    with pytest.raises(ConfigError, match="supports Linear modules, and this GPT2LMHeadModel has none"):
        stored(shape_of("gpt2"), "hqq4", 2, False)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["nf4", "int8-torchao", "hqq4"])
def test_what_the_products_keep(name: str, lora_dropout: float, targets: Any) -> None:
    import torch
    from tests.quantized_layers import quantized_linear

    from lorakit import core, hub

    from .test_activations import LENGTH, ROWS, _model, _saved_bytes

    if importlib.util.find_spec(storage_named(name).package) is None:
        pytest.skip("not installed")
    model = _model("llama", 0.0)
    shape = hub.shape_of_module(model, "small", "here")
    for site in quantized_sites(shape, storage_named(name)):
        model.set_submodule(site.path, quantized_linear(model.get_submodule(site.path), Quantization(name)))
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=lora_dropout)
    core.attach(model, config)
    model.train()
    saved = _saved_bytes(model, torch.randint(0, 300, (ROWS, LENGTH)))
    job = Job(ROWS, LENGTH, dtype="float32", quantization=name)
    base = stored(shape, name, 4, double=True)
    planned = activations.of_lora(shape, count(shape, config), lora_dropout, job, base)
    expected = planned.blocks + planned.outside + logits_bytes(shape, job) // 3
    assert expected == pytest.approx(saved, rel=0.03)
