"""KaSA: the truncated base is attached and detached with the adapter; penalty, restrictions, and files against peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit import core
from lorakit import peft as ours
from lorakit.config import LoraConfig
from lorakit.core.variants import kasa
from lorakit.errors import AdapterError, AdapterFileError, ConfigError

from ...laws.quantized import specimen as quantized
from ...laws.quantized import storages
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import CONV1DS, EMBEDDING, LINEARS, MHA, Specimen, randomise, run

FP32 = torch.float32
theirs = pytest.importorskip("peft")


def adapted(*names: str, **fields: Any) -> nn.Module:
    model = LINEARS.model()
    for index, name in enumerate(names):
        core.attach(model, LINEARS.config(**{"kasa_config": {}, **fields}), name, seed=index)
        randomise(model, name, seed=100 + index)
    return model


def test_a_fresh_adapter_is_the_truncated_base_and_draws_its_diagonal() -> None:
    model = LINEARS.model()
    core.attach(model, LINEARS.config(kasa_config={}), "a", seed=1)
    plain = LINEARS.model()
    with torch.no_grad():
        for name in LINEARS.targets:
            weight = plain.get_submodule(name).weight
            weight.copy_(kasa.truncated(weight, 4))
    assert_close(run(model, LINEARS.given()), run(plain, LINEARS.given()), FP32)
    diagonals = [site.layer.factor("a").own["lora_diag"] for site in core.sites(model)]
    assert all(diagonal.shape == (4,) and diagonal.requires_grad and diagonal.any() for diagonal in diagonals)
    again = LINEARS.model()
    core.attach(again, LINEARS.config(kasa_config={}), "a", seed=1)
    assert torch.equal(core.sites(again)[0].layer.factor("a").own["lora_diag"], diagonals[0])


def test_output_and_gradients_are_those_of_the_formula() -> None:
    model = adapted("a")
    layer = core.sites(model)[0].layer
    factor, x = layer.factor("a"), torch.randn(3, 12, requires_grad=True)
    update = factor.scale * factor.B @ torch.diag(factor.own["lora_diag"]) @ factor.A
    expected = F.linear(x, kasa.truncated(layer.read(), 4) + update, layer.original_bias())
    found = layer(x)
    torch.testing.assert_close(found, expected)
    inputs = [x, factor.A, factor.B, factor.own["lora_diag"]]
    pairs = zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_base_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    model = LINEARS.model(dtype)
    bits, plain = snapshot(model)["tensors"], run(model, LINEARS.given(dtype))
    for name in ("a", "b"):
        core.attach(model, LINEARS.config(kasa_config={}), name)
        randomise(model, name, seed=ord(name))
    with core.disable(model):
        assert torch.equal(run(model, LINEARS.given(dtype)), plain)
    core.merge(model, "a")
    core.unmerge(model)
    core.detach(model, "a")
    core.detach(model)
    assert snapshot(model)["tensors"] == bits


def test_the_penalty_is_pefts() -> None:
    config = {"beta": 0.1, "gamma": 0.2}
    made = []
    for library in (theirs, ours):
        fields = {"r": 4, "target_modules": ["up", "square"], "kasa_config": library.KasaConfig(**config)}
        made.append(library.get_peft_model(LINEARS.model(), library.LoraConfig(**fields)))
    numbers = dict(made[0].named_parameters())
    with torch.no_grad():
        for name, parameter in made[1].named_parameters():
            if ".lora_" in name:
                numbers[name].copy_(torch.randn(parameter.shape))
                parameter.copy_(numbers[name])
    losses = [model._get_kasa_loss() for model in made]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for name, parameter in made[1].named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(parameter.grad, numbers[name].grad)
    with made[1].disable_adapter():
        assert made[1]._get_kasa_loss() == 0.0


@pytest.mark.parametrize("rank", [7, 8])
def test_the_rank_is_below_both_dimensions(rank: int) -> None:
    model = LINEARS.model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"out: KaSA requires `r` <= 6") as refused:
        core.attach(model, LoraConfig(r=rank, target_modules=["up", "out"], kasa_config={}), "a")
    assert (refused.value.what, refused.value.where, refused.value.field) == (str(rank), "out", "r")
    assert snapshot(model) == before
    core.attach(model, LoraConfig(r=6, target_modules=["out"], kasa_config={}), "a")


@pytest.mark.parametrize("specimen", [CONV1DS, EMBEDDING, MHA], ids=str)
def test_kinds_other_than_linear_are_refused(specimen: Specimen) -> None:
    with pytest.raises(ConfigError, match="does not support KaSA;") as refused:
        core.attach(specimen.model(), specimen.config(kasa_config={}), "a")
    assert refused.value.field == "kasa_config" and refused.value.allowed == ("Linear",)


@pytest.mark.parametrize("storage", storages())
def test_a_quantized_base_is_refused(storage: Any) -> None:
    made = quantized(storage)
    with pytest.raises(ConfigError, match="KaSA changes the base weight, but the weight is quantized") as refused:
        core.attach(made.model(), made.config(kasa_config={}), "a")
    assert (refused.value.where, refused.value.field) == ("up", "kasa_config")


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_excludes_it_in_one_adapter(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"mutually exclusive|KaSA changes it too"):
        core.attach(LINEARS.model(), LINEARS.config(kasa_config={}, **fields), "a")


def test_it_stands_beside_its_like_alone(tmp_path: Path) -> None:
    model = adapted("a", "b")
    with pytest.raises(ConfigError, match="KaSA cannot be combined with adapters that don't use KaSA") as refused:
        core.attach(model, LINEARS.config(), "plain")
    assert (refused.value.what, refused.value.field) == ("a", "kasa_config")
    core.save_adapter(model, tmp_path / "a", "a")
    other = LINEARS.model()
    core.attach(other, LINEARS.config(use_dora=True), "dora")
    with pytest.raises(ConfigError, match="has adapter 'dora'"):
        core.load_adapter(other, tmp_path / "a", "a")


def test_it_is_no_plain_lora(tmp_path: Path) -> None:
    model = adapted("a", "b")
    with pytest.raises(AdapterError, match="KaSA changed the base by more than a low-rank product"):
        core.combine(model, ["a", "b"], [1.0, 1.0], "sum")
    with pytest.raises(AdapterError, match="KaSA changed the base"):
        core.compress(model, "a", "small", rank=1)
    core.save_adapter(model, tmp_path / "a", "a")
    core.save_adapter(model, tmp_path / "b", "b")
    with pytest.raises(AdapterFileError, match="KaSA changed the base"):
        core.combine_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", [1.0, 1.0])


def test_settings_are_checked_and_come_back(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be non-negative") as refused:
        LoraConfig(kasa_config={"beta": -1.0})
    assert refused.value.field == "kasa_config.beta"
    model = adapted("a", kasa_config={"beta": 0.5, "gamma": 0.0})
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a", trainable=True)
    first, second = core.penalties(model), core.penalties(again)
    assert first is not None and second is not None and torch.equal(first, second)
