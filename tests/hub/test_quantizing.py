"""Models that are quantized on loading: which modules are, errors, and that the base does not change."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import hub
from lorakit.core.model.base_view import quantized_weights
from lorakit.errors import ConfigError, MissingExtra, ModelError
from lorakit.plan.quantized import STORAGES, Quantization, Storage, quantized_sites, stored

IDS = torch.tensor([[5, 17, 200, 3, 9, 44]])
CLOSE = {"nf4": 0.3, "fp4": 0.4, "hqq4": 0.3, "int8": 0.1, "int8-torchao": 0.05, "hqq8": 0.05}

EVERY = pytest.mark.parametrize(
    "storage",
    [
        pytest.param(
            storage,
            id=storage.name,
            marks=pytest.mark.skipif(importlib.util.find_spec(storage.package) is None, reason="not installed"),
        )
        for storage in STORAGES
    ],
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_plan_says_is_stored_in_fewer_bits(storage: Storage, dtype: str, wide_model_directory: Path) -> None:
    model = hub.load_model(wide_model_directory, dtype, quantization=storage.name)
    shape = hub.shape_of(wide_model_directory)
    found = list(quantized_weights(model))
    assert [weight.name for weight in found] == [f"{site.path}.weight" for site in quantized_sites(shape, storage)]
    rest = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for name, tensor in model.named_parameters()
        if name not in {weight.packed for weight in found}
    }
    packed = [tensor for weight in found for tensor in weight.base.tensors(weight.stored)]
    held = sum(rest.values()) + sum(tensor.numel() * tensor.element_size() for tensor in packed)
    number = 4 if dtype == "float32" else 2
    planned = stored(shape, storage.name, number, double=True)
    assert held == number * planned.rest + planned.size_bytes
    assert {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()} == {getattr(torch, dtype)}
    assert not model.training


@EVERY
def test_it_says_about_what_the_plain_model_says_in_either_mode(storage: Storage, wide_model_directory: Path) -> None:
    plain = logits(hub.load_model(wide_model_directory, "float32"))
    model = hub.load_model(wide_model_directory, "float32", quantization=storage.name)
    first = logits(model)
    assert (first - plain).norm() < CLOSE[storage.name] * plain.norm()
    model.train()
    training = logits(model)
    model.eval()
    assert torch.equal(logits(model), first)
    assert torch.equal(training, first) or storage.name == "int8"  # which rounds activations where it evaluates


def test_double_quantization_takes_less(wide_model_directory: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for double in (True, False):
        model = hub.load_model(wide_model_directory, quantization=Quantization("nf4", double))
        assert all(weight.stored.quant_state.nested == double for weight in quantized_weights(model))


def test_the_packed_model_directory_is_loaded_as_it_is(wide_model_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = hub.load_model(wide_model_directory, "float32", quantization="nf4")
    model.save_pretrained(tmp_path / "packed")
    again = hub.load_model(tmp_path / "packed", "float32")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ConfigError, match=r"files are already quantized \(bitsandbytes\)"):
        hub.load_model(tmp_path / "packed", quantization="nf4")


def test_widths_that_the_package_multiplies_out_wrongly_are_refused(
    tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some releases of bitsandbytes do this on a CPU (0.49, not 0.50.2); here one value of each weight is changed."""
    functional = pytest.importorskip("bitsandbytes.functional")
    real = functional.dequantize_4bit

    def faulty(*arguments: Any, **named: Any) -> Any:
        values = real(*arguments, **named)
        values.view(-1)[0] += 0.1
        return values

    monkeypatch.setattr(functional, "dequantize_4bit", faulty)
    with pytest.raises(ModelError, match=r"does not dequantize .* correctly"):
        hub.load_model(tiny_model_directory, "float32", device="cpu", quantization="nf4")


def test_what_hqq_cannot_store_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("hqq")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"q_proj has 400 values, not a multiple of 128"):
        hub.load_model(tmp_path, quantization="hqq4")


def test_a_missing_package_is_named(wide_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else (found(name, package) or name == "accelerate")

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(MissingExtra, match=r"needs bitsandbytes; run pip install 'lorakit\[quant\]'"):
        hub.load_model(wide_model_directory, quantization="nf4")


def test_an_unknown_word_is_refused(wide_model_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization is 'nf5'; it must be one of .*Did you mean nf4\?"):
        hub.load_model(wide_model_directory, quantization="nf5")


def test_transformers_conv1d_is_stored_by_bitsandbytes_alone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = hub.load_model(tmp_path, "float32", quantization="nf4")
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Linear4bit"
    shape = hub.shape_of(tmp_path)
    assert len(list(quantized_weights(model))) == len(stored(shape, "nf4", 4, True).sites) == 4
    with pytest.raises(ConfigError, match="supports Linear modules, and this GPT2LMHeadModel has none"):
        stored(shape, "int8-torchao", 4, True)
    multiplied = next(iter(quantized_weights(model))).dequantized(torch.float32)
    assert type(multiplied).__name__ == "Conv1D" and isinstance(multiplied, nn.Module)
