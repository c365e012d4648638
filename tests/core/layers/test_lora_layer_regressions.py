"""Regressions from a review: fast paths, embeddings with max_norm, autocast, exceptions, meta tensors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import attach, detach, merge, route
from lorakit.errors import ConfigError, MergeError


def noisy(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"]])
def test_torchs_fast_path_of_an_encoder_does_not_pass_adapters_over(targets: list[str]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    base = encoder(x)
    attach(encoder, LoraConfig(r=2, target_modules=targets))
    noisy(encoder)
    with torch.no_grad():
        fast = encoder(x)
    torch.testing.assert_close(fast, encoder.train()(x), rtol=1e-4, atol=1e-5)
    assert (fast - base).abs().max() > 0.1
    torch.testing.assert_close(pickle.loads(pickle.dumps(encoder.eval()))(x), fast, rtol=1e-4, atol=1e-5)
    detach(encoder)
    torch.testing.assert_close(encoder(x), base)


def test_a_table_with_a_largest_norm_leaves_a_alone_and_is_not_merged() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5)).eval()
    attach(model, LoraConfig(r=2, target_modules=["0"]))
    noisy(model)
    before = model[0].lora_embedding_A["default"].detach().clone()
    with torch.no_grad():
        model(torch.arange(10))
    assert torch.equal(model[0].lora_embedding_A["default"], before)
    with pytest.raises(MergeError, match="max_norm rescales the rows"):
        merge(model)


def test_dora_keeps_the_dtype_of_an_autocast_base() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    attach(model, LoraConfig(r=2, target_modules=["0"], use_dora=True), "a")
    attach(model, LoraConfig(r=2, target_modules=["0"]), "b")
    noisy(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(torch.randn(2, 6)).dtype == torch.bfloat16
        with route(model, ["a", "b"]):
            assert model(torch.randn(2, 6)).dtype == torch.bfloat16


def test_an_exception_ends_with_its_adapter() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    for name in "ab":
        attach(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), name)
    x = torch.randn(2, 6)
    expected = model(x)
    model[0].set_adapter("b")
    detach(model, "b")
    assert model[0].active_adapters == ["a"]
    assert torch.equal(model(x), expected)
    attach(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "b")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_on_meta_an_init_that_moves_the_base_is_refused_before_anything_changes(init: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ConfigError, match="meta device"):
        attach(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_an_encoder_layer_that_is_the_model_calls_its_adapted_layers() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model(x)
        attach(model, LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False))
        assert not torch.equal(model(x), before)
