"""BD-LoRA: blocks against the formula, merging, sums, restrictions; files are compared with peft in conformance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.nested import BdLoraConfig
from lorakit.core.variants import PLAIN, bdlora
from lorakit.errors import ConfigError

from ...laws.quantized import specimen as quantized
from ...laws.quantized import storages
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import CONV1DS, EMBEDDING, LINEARS, MHA, Specimen, randomise, run

FP32 = torch.float32
BLOCKS = BdLoraConfig(["up"], ["square"], nblocks=4)


def adapted(*names: str, **fields: Any) -> nn.Module:
    model = LINEARS.model()
    for index, name in enumerate(names):
        core.attach(model, LINEARS.config(**{"use_bdlora": BLOCKS, **fields}), name, seed=index)
        randomise(model, name, seed=100 + index)
    return model


def test_output_and_gradients_are_those_of_the_formula() -> None:
    model = adapted("a")
    for site, side in zip(core.sites(model), "AB", strict=True):
        factor, x = site.layer.factor("a"), torch.randn(3, site.in_features, requires_grad=True)
        assert factor.setting["side"] == side
        A, B = factor.A, factor.B
        if side == "A":
            h = torch.cat([F.linear(p, q) for p, q in zip(x.chunk(4, -1), A.chunk(4), strict=True)], -1)
            z = F.linear(h, B)
        else:
            h = F.linear(x, A)
            z = torch.cat([F.linear(p, q) for p, q in zip(h.chunk(4, -1), B.chunk(4), strict=True)], -1)
        expected = F.linear(x, site.layer.read(), site.layer.original_bias()) + factor.scale * z
        found = site.layer(x)
        torch.testing.assert_close(found, expected)
        pairs = zip(*(torch.autograd.grad(y.square().sum(), [x, A, B]) for y in (found, expected)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_sum_of_several_is_plain_lora(way: str) -> None:
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a", "b")
    before = run(model, given)
    asked = core.CombinationType(way, rank=8) if way == "svd" else way
    made = core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way=asked)
    assert made.config.use_bdlora is None
    with core.use(model, "sum"):
        assert_close(run(model, given), before, FP32)


def test_sites_in_neither_list_are_lora_where_that_is_allowed(tmp_path: Path) -> None:
    loose = BdLoraConfig(["up"], nblocks=2, match_strict=False)
    model = adapted("a", use_bdlora=loose)
    first, second = (site.layer.factor("a") for site in core.sites(model))
    assert first.variant.title == "BD-LoRA" and second.variant is PLAIN
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a")
    assert torch.equal(run(again, LINEARS.given()), run(model, LINEARS.given()))


@pytest.mark.parametrize(
    ("fields", "words", "where"),
    [
        (
            {"use_bdlora": {"target_modules_bd_a": ["up"]}},
            "square matches neither A nor B block-diagonal patterns",
            "square",
        ),
        (
            {"use_bdlora": {"target_modules_bd_a": ["u"], "target_modules_bd_b": ["up"], "match_strict": False}},
            "up matches both",
            "up",
        ),
        (
            {"use_bdlora": {"target_modules_bd_a": ["up", "sq"], "nblocks": 3}},
            "up: r is 4, which is not divisible by 3, the number of blocks of A",
            "up",
        ),
        (
            {"use_bdlora": {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["sq"], "nblocks": 3}, "r": 3},
            "square: out_features is 20, which is not divisible by 3, the number of blocks of B",
            "square",
        ),
        (
            {"use_bdlora": BLOCKS, "lora_bias": True},
            "lora_bias at square: a block-diagonal B cannot have a bias",
            "square",
        ),
        ({"use_bdlora": BLOCKS, "use_dora": True}, "mutually exclusive", "up"),
        ({"use_bdlora": BLOCKS, "init_lora_weights": "orthogonal"}, "needs A and B in their standard shapes", "up"),
    ],
    ids=str,
)
def test_what_is_refused(fields: dict[str, Any], words: str, where: str) -> None:
    model = LINEARS.model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=words) as refused:
        core.attach(model, LINEARS.config(**fields), "a")
    assert refused.value.where == where and refused.value.field is not None
    assert snapshot(model) == before


@pytest.mark.parametrize("specimen", [CONV1DS, EMBEDDING, MHA], ids=str)
def test_kinds_other_than_linear_are_refused(specimen: Specimen) -> None:
    everywhere = BdLoraConfig([""], nblocks=2)
    with pytest.raises(ConfigError, match=r"does not support BD-LoRA") as refused:
        core.attach(specimen.model(), specimen.config(use_bdlora=everywhere), "a")
    assert refused.value.field == "use_bdlora" and refused.value.allowed == ("Linear",)


@pytest.mark.parametrize("storage", storages())
def test_on_a_quantized_base_it_is_itself(storage: Any) -> None:
    made = quantized(storage)
    model = made.model()
    core.attach(model, made.config(use_bdlora=BLOCKS), "a")
    assert [tuple(site.layer.factor("a").A.shape) for site in core.sites(model)] == [(4, 16), (4, 128)]
    assert torch.equal(run(model, made.given()), run(made.model(), made.given()))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="must be at least 1") as refused:
        LoraConfig(use_bdlora={"nblocks": 0})
    assert refused.value.field == "use_bdlora.nblocks"
    with pytest.raises(ConfigError, match="Found overlapping modules in target_modules_bd lists") as refused:
        BdLoraConfig(["q"], ["q"])
    assert (refused.value.what, refused.value.field) == ("q", "target_modules_bd_a")


def test_blocks_stand_on_the_diagonal() -> None:
    found = bdlora.block_diagonal(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2)
    assert torch.equal(found, torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6)])
def test_the_module_of_the_blocks_multiplies_by_the_block_diagonal_matrix(shape: tuple[int, ...]) -> None:
    module, x = bdlora.BlockDiagonalLinear(6, 4, nblocks=2), torch.randn(shape)
    assert module.weight.shape == (4, 3) and module.weight.any()
    matrix = module.weight_as_blockdiagonal_matrix()
    assert matrix.shape == (4, 6) and not matrix[:2, 3:].any() and not matrix[2:, :3].any()
    torch.testing.assert_close(module(x), F.linear(x, matrix))
    assert not bdlora.BlockDiagonalLinear(6, 4, 2, init_zero=True, dtype=torch.float64).weight.any()
    with pytest.raises(ConfigError, match=r"in_features.*5.*2") as caught:
        bdlora.BlockDiagonalLinear(5, 4, 2)
    assert caught.value.fields["field"] == "nblocks"


def test_a_layer_holds_its_blocks_in_that_module() -> None:
    model = adapted("a")
    for site, side in zip(core.sites(model), "AB", strict=True):
        held = {"A": site.layer.lora_A["a"], "B": site.layer.lora_B["a"]}
        factor = site.layer.factor("a").plain()
        assert [type(module) is bdlora.BlockDiagonalLinear for module in held.values()] == [side == "A", side == "B"]
        assert torch.equal(held[side].weight_as_blockdiagonal_matrix(), factor.A if side == "A" else factor.B)
