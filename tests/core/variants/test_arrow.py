"""Arrow: prototypes and routing against the formulas; experts of other ranks and variants; what is an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.variants.arrow import PROTOTYPES, coefficients, prototype
from lorakit.errors import AdapterError, ConfigError, MergeError
from lorakit.speed import accelerate

from ...laws.quantized import specimen as quantized
from ...laws.quantized import storages
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import EMBEDDING, LINEARS, MHA, Specimen, output, randomise, run

FP32 = torch.float32
ASKED = {"top_k": 2, "router_temperature": 0.5, "rng_seed": 1}


def routed(*experts: str, dtype: torch.dtype = FP32, router: dict[str, Any] | None = None, **fields: Any) -> nn.Module:
    """Return a model with experts, and an active router over them."""
    model = LINEARS.model(dtype)
    for index, name in enumerate(experts):
        core.attach(model, LINEARS.config(**fields), name)
        randomise(model, name, seed=100 + index)
    core.attach(model, LINEARS.config(arrow_config={**ASKED, **(router or {})}), "router")
    core.activate(model, "router")
    return model


def by_hand(layer: LoraLayer, x: Tensor, names: list[str], general: list[str] | None = None) -> Tensor:
    """Return the addition (rows, out) for x (rows, in), row by row, with prototypes from a singular value decomposition."""
    factors = {name: layer.factor(name) for name in names}
    mean = [torch.stack([getattr(layer.factor(g), side) for g in general]).mean(0) if general else 0 for side in "AB"]
    A, B = ({name: getattr(f, side) - m for name, f in factors.items()} for side, m in zip("AB", mean, strict=True))
    found = []
    for row in x:
        fit = {name: abs(float(row @ torch.linalg.svd((B[name] @ A[name]).detach())[2][0])) for name in names}
        best = sorted(names, key=lambda name: fit[name])[-2:]
        weights = torch.softmax(torch.tensor([fit[name] for name in best]) / 0.5, 0)
        parts = [w * factors[n].scale * (B[n] @ (A[n] @ row)) for n, w in zip(best, weights, strict=True)]
        found.append(parts[0] + parts[1])
    return torch.stack(found)


def separated(model: nn.Module) -> nn.Module:
    """Give each update one dominant direction, so that the power iteration converges."""
    with torch.no_grad():
        for site in core.sites(model):
            for name in site.layer.r:
                site.layer.factor(name).A[0].mul_(8)
                site.layer.factor(name).B[:, 0].mul_(8)
    return model


def test_each_token_goes_to_the_experts_whose_direction_fits() -> None:
    model = separated(routed("a", "b", "c"))
    layer, x = core.sites(model)[0].layer, torch.randn(6, 12)
    with core.disable(model):
        plain = layer(x)
    torch.testing.assert_close(layer(x) - plain, by_hand(layer, x, ["a", "b", "c"]), rtol=1e-3, atol=1e-4)
    assert layer(x[None]).shape == (1, 6, layer.out_features)
    torch.testing.assert_close(layer(x[None])[0], layer(x))


def test_general_knowledge_is_subtracted_without_changing_the_adapters() -> None:
    model = routed("a", "b", "gks_0", "gks_1", router={"use_gks": True})
    layer, x = core.sites(separated(model))[0].layer, torch.randn(6, 12)
    before = {name: layer.factor(name).A.clone() for name in layer.r}
    with core.disable(model):
        plain = layer(x)
    found = layer(x) - plain
    torch.testing.assert_close(found, by_hand(layer, x, ["a", "b"], ["gks_0", "gks_1"]), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(layer.factor(name).A, A) for name, A in before.items())
    layer(x).sum().backward()
    assert layer.factor("gks_0").A.grad is None and layer.factor("a").A.grad is not None


def test_the_prototype_is_the_main_direction() -> None:
    A, B = torch.randn(4, 12), torch.randn(7, 4)
    A[0] *= 9
    expected = torch.linalg.svd(B @ A)[2][0]
    for seed in (1, 2):
        found = prototype(A, B, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found * (found @ expected).sign(), expected, rtol=1e-3, atol=1e-3)
    assert not prototype(A, torch.zeros(7, 4)).any()


def test_coefficients_of_all_but_the_best_are_zero() -> None:
    x, prototypes = torch.randn(2, 3, 5), torch.randn(4, 5)
    found = coefficients(x, prototypes, 2, 1.0)
    assert ((found > 0).sum(-1) == 2).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(coefficients(-x, prototypes, 2, 1.0), found)


def test_prototypes_follow_the_adapters_of_the_site() -> None:
    model = routed("a", "b")
    layer, x = core.sites(model)[0].layer, torch.randn(3, 12)
    layer(x)
    first = layer.memory["router"][PROTOTYPES]
    layer(x)
    assert layer.memory["router"][PROTOTYPES] is first
    core.attach(model, LINEARS.config(), "c")
    randomise(model, "c", seed=5)
    layer(x)
    assert layer.memory["router"][PROTOTYPES].shape == (3, 12)
    torch.testing.assert_close(layer.memory["router"][PROTOTYPES][:2], first)
    core.detach(model, "a")
    with pytest.raises(AdapterError) as refused:
        core.detach(model, "b")
        layer(x)
    assert refused.value.field == "arrow_config.top_k" and refused.value.where == "up"
    assert not any("prototype" in name for name in model.state_dict())
    copied = copy.deepcopy(routed("a", "b"))
    assert_close(run(copied, LINEARS.given()), run(routed("a", "b"), LINEARS.given()), FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_of_the_base(dtype: torch.dtype) -> None:
    model, exact = routed("a", "b", "c", dtype=dtype), routed("a", "b", "c")
    layer, other = core.sites(model)[0].layer, core.sites(exact)[0].layer
    x = torch.randn(5, 12).to(dtype)
    with core.disable(model), core.disable(exact):
        plain, same = layer(x), other(x.float())
    assert layer(x).dtype == dtype
    expected, tolerance = other(x.float()) - same, 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close((layer(x) - plain).float(), expected, rtol=tolerance, atol=tolerance)


def test_experts_may_have_other_ranks_and_shapes() -> None:
    model = routed("a", "b")
    core.attach(model, LINEARS.config(r=2), "narrow")
    core.attach(model, LINEARS.config(use_qalora=True, qalora_group_size=4), "groups")
    for name in ("narrow", "groups"):
        randomise(model, name, seed=1)
    assert run(model, LINEARS.given()).isfinite().all()


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_expert_of_another_kind_is_an_error(fields: dict[str, Any]) -> None:
    model = routed("a", "b")
    core.attach(model, LINEARS.config(**fields), "other")
    with pytest.raises(AdapterError, match="cannot route to adapter 'other'") as refused:
        run(model, LINEARS.given())
    assert refused.value.what is not None


def test_general_adapters_of_other_shapes_are_an_error() -> None:
    model = routed("a", "b", router={"use_gks": True})
    for shaped in (None, {"r": 2}):
        if shaped:
            core.attach(model, LINEARS.config(**shaped), "gks_0")
        with pytest.raises(AdapterError, match="cannot be subtracted") as refused:
            run(model, LINEARS.given())
        assert refused.value.field == "use_gks"


def test_rows_of_a_batch_have_their_own_adapters() -> None:
    model, given = routed("a", "b", "c"), LINEARS.given()
    names = ["router", "b", None, "router"]
    with core.route(model, names):
        mixed = run(model, given)
    for row, name in enumerate(names):
        with core.use(model, name) if name else core.disable(model):
            assert_close(mixed[row], run(model, given)[row], FP32)


def test_it_is_not_merged_combined_or_fused(tmp_path: Path, tiny_llama: nn.Module) -> None:
    model, given = routed("a", "b"), LINEARS.given()
    before = run(model, given)
    with pytest.raises(MergeError, match="routes each token"):
        core.merge(model, "router")
    with pytest.raises(AdapterError, match="settings of Arrow"):
        core.combine(model, ["a", "router"], [1.0, 1.0], "sum", way="cat")
    assert torch.equal(run(model, given), before)
    core.save_adapter(model, tmp_path / "router", "router")
    core.detach(model, "router")
    core.load_adapter(model, tmp_path / "router", "router")
    core.activate(model, "router")
    assert torch.equal(run(model, given), before)
    for index, name in enumerate(("a", "b")):
        core.attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), name)
        randomise(tiny_llama, name, seed=index)
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], arrow_config=ASKED), "router")
    core.activate(tiny_llama, "router")
    ids = torch.arange(12).view(2, 6)
    tiny_llama.eval()
    with torch.no_grad():
        expected = tiny_llama(input_ids=ids).logits
        accelerate(tiny_llama)
        torch.testing.assert_close(tiny_llama(input_ids=ids).logits, expected)


@pytest.mark.parametrize("specimen", [EMBEDDING, MHA], ids=str)
def test_kinds_without_a_dense_layer_are_refused(specimen: Specimen) -> None:
    model = specimen.model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="does not support Arrow;") as refused:
        core.attach(model, specimen.config(arrow_config={}), "a")
    assert refused.value.field == "arrow_config"
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"arrow_config": {"top_k": 0}}, "arrow_config.top_k"),
        ({"arrow_config": {"router_temperature": 0.0}}, "arrow_config.router_temperature"),
        ({"arrow_config": {}, "lora_dropout": 0.1}, "lora_dropout"),
        ({"arrow_config": {}, "use_dora": True}, "use_dora"),
    ],
    ids=str,
)
def test_settings_are_checked(fields: dict[str, Any], field: str) -> None:
    model = LINEARS.model()
    before = snapshot(model)
    with pytest.raises(ConfigError) as refused:
        core.attach(model, LINEARS.config(**fields), "a")
    assert refused.value.field == field and snapshot(model) == before


@pytest.mark.parametrize("storage", storages())
def test_a_quantized_base(storage: Any) -> None:
    made = quantized(storage)
    model = made.model()
    for index, name in enumerate(("a", "b")):
        core.attach(model, made.config(), name)
        randomise(model, name, seed=index)
    with core.disable(model):
        plain = run(model, made.given())
    core.attach(model, made.config(arrow_config=ASKED), "router")
    core.activate(model, "router")
    assert not torch.allclose(output(model, made.given()), plain)
