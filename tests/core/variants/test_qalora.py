"""QA-LoRA: the pooled input against the formula and peft's layer for GPTQ, merging, sums, files, restrictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.variants import qalora
from lorakit.errors import ConfigError
from lorakit.peft import LoraConfig as OurConfig
from lorakit.peft import get_peft_model

from ...laws.quantized import specimen as quantized
from ...laws.quantized import storages
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import EMBEDDING, LINEARS, MHA, Specimen, output, randomise, run

FP32 = torch.float32
GROUPS = {"use_qalora": True, "qalora_group_size": 4}
theirs = pytest.importorskip("peft")


def adapted(*names: str, **fields: Any) -> nn.Module:
    model = LINEARS.model()
    for index, name in enumerate(names):
        core.attach(model, LINEARS.config(**{**GROUPS, **fields}), name, seed=index)
        randomise(model, name, seed=100 + index)
    return model


def test_output_and_gradients_are_those_of_the_formula() -> None:
    model = adapted("a").double()
    for site in core.sites(model):
        factor = site.layer.factor("a")
        x = torch.randn(3, site.in_features, dtype=torch.float64, requires_grad=True)
        number = site.in_features // 4
        assert factor.A.shape == (4, number)
        means = x.view(3, number, 4).mean(-1)
        z = F.linear(F.linear(means * number, factor.A), factor.B) * factor.scale
        expected = F.linear(x, site.layer.read(), site.layer.original_bias()) + z
        found = site.layer(x)
        torch.testing.assert_close(found, expected)
        inputs = [x, factor.A, factor.B]
        pairs = zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)


def test_output_and_gradients_are_those_of_peft_s_gptq_layer() -> None:
    """peft's layer for GPTQ takes any module with the sizes of a linear layer as its base."""
    gptq = pytest.importorskip("peft.tuners.lora.gptq")
    torch.manual_seed(0)
    base, x = nn.Linear(12, 20).double(), torch.randn(2, 3, 12, dtype=torch.float64)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], **GROUPS}
    other = gptq.GPTQLoraLinear(base, "default", config=theirs.LoraConfig(**fields), r=4, lora_alpha=6).double()
    model = get_peft_model(nn.Sequential(base), OurConfig(**fields))
    found, given = dict(model.named_parameters()), dict(other.named_parameters())
    with torch.no_grad():
        for name in ("lora_A.default.weight", "lora_B.default.weight"):
            found[f"base_model.model.0.{name}"].copy_(given[name].normal_())
    one, two = model(x), other(x)
    torch.testing.assert_close(one, two)
    one.square().sum().backward()
    two.square().sum().backward()
    for name in ("lora_A.default.weight", "lora_B.default.weight"):
        torch.testing.assert_close(found[f"base_model.model.0.{name}"].grad, given[name].grad)


def test_an_update_is_constant_within_each_group() -> None:
    found = qalora.repeated(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 4)
    assert torch.equal(found, torch.tensor([[1.0] * 4 + [2.0] * 4, [3.0] * 4 + [4.0] * 4]) * (8 / 16))


def test_it_is_merged_and_comes_back_from_disk(tmp_path: Path) -> None:
    model, given = adapted("a"), LINEARS.given()
    before, bits = run(model, given), snapshot(model)["tensors"]
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a", trainable=True)
    assert torch.equal(run(again, given), before)
    config = core.adapters(again)["a"]
    assert (config.use_qalora, config.qalora_group_size) == (True, 4)
    core.merge(model, "a")
    assert_close(run(model, given), before, FP32)
    core.unmerge(model)
    assert snapshot(model)["tensors"] == bits


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_sum_of_several_is_plain_lora(way: str) -> None:
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a", "b")
    before = run(model, given)
    asked = core.CombinationType(way, rank=8) if way == "svd" else way
    made = core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way=asked)
    assert not made.config.use_qalora
    with core.use(model, "sum"):
        assert_close(run(model, given), before, FP32)


@pytest.mark.parametrize(
    ("fields", "words", "where"),
    [
        ({"qalora_group_size": 5}, "up: in_features is 12, which is not divisible by qalora_group_size", "up"),
        ({"use_dora": True}, "mutually exclusive", "up"),
        ({"init_lora_weights": "pissa"}, "needs A and B in their standard shapes|QA-LoRA", "up"),
    ],
    ids=str,
)
def test_what_is_refused(fields: dict[str, Any], words: str, where: str) -> None:
    model = LINEARS.model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=words) as refused:
        core.attach(model, LINEARS.config(**{**GROUPS, **fields}), "a")
    assert refused.value.where == where and refused.value.field is not None
    assert snapshot(model) == before


@pytest.mark.parametrize("specimen", [EMBEDDING, MHA], ids=str)
def test_kinds_without_a_dense_layer_are_refused(specimen: Specimen) -> None:
    with pytest.raises(ConfigError, match="does not support QA-LoRA;") as refused:
        core.attach(specimen.model(), specimen.config(use_qalora=True), "a")
    assert refused.value.field == "use_qalora" and refused.value.allowed == ("Linear", "Conv1D")


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_has_inputs(size: int) -> None:
    with pytest.raises(ConfigError, match="qalora_group_size") as refused:
        LoraConfig(use_qalora=True, qalora_group_size=size)
    assert (refused.value.field, refused.value.what) == ("qalora_group_size", str(size))


@pytest.mark.parametrize("storage", storages())
def test_a_quantized_base_is_trained(storage: Any) -> None:
    made = quantized(storage)
    model = made.model()
    core.attach(model, made.config(**GROUPS), "a")
    randomise(model, "a", seed=1)
    output(model.train(), made.given()).float().sum().backward()
    assert all(site.layer.factor("a").A.grad is not None for site in core.sites(model))
