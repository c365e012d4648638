"""VeLoRA: output, gradients and projection against the formula, merging, mixed batches, restrictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.nested import VeloraConfig
from lorakit.core.variants import velora
from lorakit.errors import ConfigError

from ...laws.quantized import specimen as quantized
from ...laws.quantized import storages
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import EMBEDDING, LINEARS, MHA, Specimen, output, randomise, run

FP32 = torch.float32
theirs = pytest.importorskip("peft.tuners.lora.velora")


def adapted(*names: str, **fields: Any) -> nn.Module:
    model = LINEARS.model()
    for index, name in enumerate(names):
        core.attach(model, LINEARS.config(**{"velora_config": {"num_groups": 5}, **fields}), name, seed=index)
        randomise(model, name, seed=100 + index)
    return model.train()


def gradients(model: nn.Module, given: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, given).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("groups", [1, 5, 6, 40])
def test_the_gradients_are_peft_s(groups: int) -> None:
    torch.manual_seed(0)
    x, A, v = torch.randn(2, 3, 12), torch.randn(4, 12), velora.unit(torch.randn(-(-12 // groups)))
    found, expected = [], []
    for function, results in ((velora.compressed_linear, found), (theirs.VeloraFunction.apply, expected)):
        a, b = x.clone().requires_grad_(), A.clone().requires_grad_()
        y = function(a, b, v, groups, 0.5) if results is found else function(a, b, None, v, groups, 0.5)
        y.square().sum().backward()
        results += [y, a.grad, b.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("init", ["batch_average", "batch_average_once", "random"])
def test_output_and_gradients_are_those_of_the_formula(init: str) -> None:
    model = adapted("a", velora_config={"num_groups": 5, "scale": 0.5, "init_type": init})
    layer, x = core.sites(model)[0].layer, torch.randn(3, 12, requires_grad=True)
    factor = layer.factor("a")
    found = layer(x)
    pieces = F.pad(x.detach(), (0, 3)).view(3, 5, 3)  # 12 inputs in 5 groups of 3, the last of them padding
    v = factor.own[velora.PROJECTION]
    if init != "random":
        torch.testing.assert_close(v, F.normalize(pieces.mean((0, 1)), dim=0))
    copied = ((pieces @ v)[..., None] * v).flatten(1)[:, :12]
    plain = F.linear(F.linear(x, factor.A) * factor.scale, factor.B)
    torch.testing.assert_close(found, F.linear(x, layer.read(), layer.original_bias()) + plain)
    g = torch.randn_like(found)
    of_x, of_A = torch.autograd.grad(found, [x, factor.A], g)
    torch.testing.assert_close(of_x, g @ (layer.read() + factor.scale * factor.B @ factor.A))
    torch.testing.assert_close(of_A, 0.5 * factor.scale * (g @ factor.B).T @ copied)


def test_outside_training_the_gradients_are_those_of_lora() -> None:
    model, given = adapted("a").eval(), LINEARS.given()
    plain = LINEARS.model()
    core.attach(plain, LINEARS.config(), "a")
    randomise(plain, "a", seed=100)
    found, expected = gradients(model, given), gradients(plain, given)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert not any(site.layer.factor("a").own[velora.PROJECTION].any() for site in core.sites(model))


def test_when_the_projection_is_computed() -> None:
    def seen(init: str) -> list[Tensor]:
        model = adapted("a", velora_config={"num_groups": 5, "init_type": init})
        stored = core.sites(model)[0].layer.factor("a").own[velora.PROJECTION]
        found = [stored.clone()]
        for seed in (1, 2):
            torch.manual_seed(seed)
            core.sites(model)[0].layer(torch.randn(3, 12))
            found.append(stored.clone())
        return found

    begun, first, second = seen("batch_average")
    assert not begun.any() and first.any() and not torch.equal(first, second)
    begun, once, again = seen("batch_average_once")
    assert not begun.any() and torch.equal(once, first) and torch.equal(again, once)
    begun, first, second = seen("random")
    torch.testing.assert_close(begun.norm(), torch.tensor(1.0))
    assert torch.equal(begun, first) and torch.equal(first, second)
    assert torch.equal(seen("random")[0], begun)  # of the seed


def test_two_forward_passes_before_a_backward_pass() -> None:
    model = adapted("a")
    layer = core.sites(model)[0].layer
    A, (x, y) = layer.factor("a").A, torch.randn(2, 3, 12)
    apart = sum(torch.autograd.grad(layer(one).sum(), A)[0] for one in (x, y))
    torch.testing.assert_close(torch.autograd.grad((layer(x) + layer(y)).sum(), A)[0], apart)


def test_a_recomputed_forward_pass_gives_the_same_gradients() -> None:
    model = adapted("a", lora_dropout=0.5)
    layer = core.sites(model)[0].layer
    A, x = layer.factor("a").A, torch.randn(3, 12)
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        found.append(torch.autograd.grad(y.sum(), A)[0])
    assert torch.equal(*found)


def test_zeros_have_a_projection() -> None:
    torch.testing.assert_close(velora.unit(torch.zeros(4)), torch.full((4,), 0.5))


def test_only_the_compressed_input_is_saved() -> None:
    sizes: list[int] = []
    x, A = torch.randn(64, 256), torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        velora.compressed_linear(x, A, velora.unit(torch.ones(32)), 8, 1.0)
    assert sorted(sizes) == [32, 64 * 8, 4 * 256]


def test_rows_of_a_batch_have_their_own_adapters() -> None:
    fixed = VeloraConfig(num_groups=5, init_type="random")
    model, given = adapted("a", "b", velora_config=fixed), LINEARS.given()
    names = ["a", "b", "a", "b"]
    with core.route(model, names):
        mixed = gradients(model, given)
    apart: dict[str, Tensor] = {}
    for row, name in enumerate(names):
        with core.use(model, name):
            for key, gradient in gradients(model, given[row : row + 1]).items():
                apart[key] = apart.get(key, 0) + gradient
    for key, gradient in mixed.items():
        torch.testing.assert_close(gradient, apart[key])


def test_it_is_merged_and_comes_back_from_disk(tmp_path: Path) -> None:
    model, given = adapted("a"), LINEARS.given()
    output(model, given)
    before = run(model.eval(), given)
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a", trainable=True)
    assert torch.equal(run(again, given), before)
    for one, other in zip(core.sites(model), core.sites(again), strict=True):
        stored = [site.layer.factor("a").own[velora.PROJECTION] for site in (one, other)]
        assert stored[0].any() and torch.equal(*stored)
    core.merge(model, "a")
    assert_close(run(model, given), before, FP32)


def test_a_sum_of_several_is_plain_lora_and_a_cut_is_velora() -> None:
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a", "b")
    before = run(model.eval(), given)
    made = core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way="cat")
    assert made.config.velora_config is None
    with core.use(model, "sum"):
        assert_close(run(model, given), before, FP32)
    assert core.compress(model, "a", "small", rank=2).config.velora_config == VeloraConfig(num_groups=5)


@pytest.mark.parametrize("specimen", [EMBEDDING, MHA], ids=str)
def test_kinds_without_a_dense_layer_are_refused(specimen: Specimen) -> None:
    model = specimen.model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="does not support VeLoRA;") as refused:
        core.attach(model, specimen.config(velora_config={}), "a")
    assert refused.value.field == "velora_config" and refused.value.allowed == ("Linear", "Conv1D")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("values", "field"),
    [({"num_groups": 0}, "num_groups"), ({"scale": 0.0}, "scale"), ({"init_type": "mean"}, "init_type")],
)
def test_settings_are_checked(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LoraConfig(velora_config=values)
    assert refused.value.field == f"velora_config.{field}"


def test_it_excludes_other_variants() -> None:
    with pytest.raises(ConfigError, match="mutually exclusive") as refused:
        core.attach(LINEARS.model(), LINEARS.config(velora_config={}, use_dora=True), "a")
    assert refused.value.where == "up" and refused.value.what is not None


@pytest.mark.parametrize("storage", storages())
def test_a_quantized_base_is_trained(storage: Any) -> None:
    made = quantized(storage)
    model = made.model()
    core.attach(model, made.config(velora_config={"num_groups": 4}), "a")
    randomise(model, "a", seed=1)
    output(model.train(), made.given()).float().sum().backward()
    factors = [site.layer.factor("a") for site in core.sites(model)]
    assert all(factor.A.grad is not None and factor.own[velora.PROJECTION].any() for factor in factors)
