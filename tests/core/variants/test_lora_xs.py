"""LoRA-XS against a singular value decomposition by numpy, its files, and what peft must not read as LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig, read_config
from lorakit.core.optimizers import Rates, rates_by_name, trained_parts
from lorakit.core.variants.lora_xs import MATRIX
from lorakit.errors import AdapterFileError, ConfigError

from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import CONV1DS, EMBEDDING, LINEARS, Specimen, randomise, run

FP64 = torch.float64


def adapted(*names: str, specimen: Specimen = LINEARS, dtype: torch.dtype = FP64, **fields: Any) -> nn.Module:
    model = specimen.model(dtype)
    for index, name in enumerate(names):
        core.attach(model, specimen.config(use_lora_xs=True, **fields), name)
        randomise(model, name, seed=100 + index)
    return model


def update_by_numpy(W: torch.Tensor, R: torch.Tensor, scale: float) -> np.ndarray:
    """Return s·U_r·(R in numpy's signs)·Σ_r·V_rᵀ; the sign of each pair of singular vectors is free."""
    U, S, Vh = np.linalg.svd(W.detach().double().numpy(), full_matrices=False)
    r = len(R)
    return scale * U[:, :r] @ R.detach().numpy() @ np.diag(S[:r]) @ Vh[:r]


def in_signs_of_numpy(layer: core.LoraLayer, R: torch.Tensor) -> torch.Tensor:
    """Return R with the signs that make its A and B those of numpy's decomposition."""
    U = np.linalg.svd(layer.read().numpy(), full_matrices=False)[0][:, : len(R)]
    signs = torch.from_numpy(np.sign((U * layer.factor("a").B.detach().numpy()).sum(0)))
    return signs[:, None] * R * signs


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS], ids=str)
def test_update_output_and_merge_are_numpys(specimen: Specimen) -> None:
    model = adapted("a", specimen=specimen)
    layer = core.sites(model)[0].layer
    W, factor = layer.read(), layer.factor("a")
    expected = update_by_numpy(W, in_signs_of_numpy(layer, factor.own[MATRIX]), factor.scale)
    x = torch.randn(3, W.shape[1], dtype=FP64)
    with torch.no_grad():
        found = layer(x)
    bias = layer.original_bias()
    np.testing.assert_allclose(found.numpy(), x.numpy() @ (W.numpy() + expected).T + bias.detach().numpy(), atol=1e-10)
    core.merge(model, "a")
    np.testing.assert_allclose(_weight(layer), W.numpy() + expected, atol=1e-10)


def _weight(layer: core.LoraLayer) -> np.ndarray:
    weight = layer.base_layer.weight.detach().numpy()
    return weight if isinstance(layer.base_layer, nn.Linear) else weight.T


def test_the_gradient_of_R_is_the_projected_gradient_of_W() -> None:
    """∂L/∂R = s·Bᵀ·(∂L/∂W)·Aᵀ, which is not zero at R = 0, so training begins at the base."""
    model = LINEARS.model(FP64)
    core.attach(model, LINEARS.config(use_lora_xs=True), "a")
    layer = core.sites(model)[0].layer
    W, factor, x = layer.read(), layer.factor("a"), torch.randn(5, 12, dtype=FP64)
    layer(x).square().sum().backward()
    by_hand = 2 * (x @ W.T + layer.original_bias()).T @ x
    wanted = factor.scale * factor.B.numpy(force=True).T @ by_hand.numpy(force=True) @ factor.A.numpy(force=True).T
    np.testing.assert_allclose(factor.own[MATRIX].grad.numpy(), wanted, rtol=1e-9, atol=1e-12)
    assert factor.A.grad is None and factor.B.grad is None and np.abs(wanted).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_adapter_is_the_base_to_the_bit_and_trains_r_squared(dtype: torch.dtype) -> None:
    model, given = LINEARS.model(dtype), LINEARS.given(dtype)
    before = run(model, given)
    report = core.attach(model, LINEARS.config(use_lora_xs=True), "a")
    assert torch.equal(run(model, given), before)
    trained = dict(core.trainable_parameters(model))
    assert report.trainable_parameters == 2 * 4**2 and all(MATRIX in name for name in trained)


def test_loraplus_and_lorafa_leave_R_its_rate() -> None:
    parts = trained_parts(adapted("a"))
    assert set(rates_by_name(parts, Rates(1.0, b_ratio=16.0)).values()) == {1.0}
    model = adapted("a")
    assert core.optimizers.freeze_factors(model) == []
    assert len(core.trainable_parameters(model)) == 2


def test_it_comes_back_from_disk_and_peft_refuses_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, given = adapted("a"), LINEARS.given(FP64)
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model(FP64)
    core.load_adapter(again, tmp_path / "a", "a", trainable=True)
    assert torch.equal(run(again, given), run(model, given))
    assert [MATRIX in name for name, _ in core.trainable_parameters(again)] == [True, True]
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["use_lora_xs"]) == ("LORA_XS", True)
    for read in (
        lambda: peft.PeftModel.from_pretrained(LINEARS.model(FP64), tmp_path / "a"),
        lambda: peft.PeftConfig.from_pretrained(tmp_path / "a"),
        lambda: peft.LoraConfig.from_pretrained(tmp_path / "a"),
    ):
        with pytest.raises(KeyError, match="LORA_XS"):
            read()


def test_ours_reads_it_through_pefts_functions(tmp_path: Path) -> None:
    from lorakit import peft as ours

    model = ours.get_peft_model(LINEARS.model(FP64), LINEARS.config(use_lora_xs=True))
    randomise(model.get_base_model(), "default", seed=3)
    model.save_pretrained(tmp_path)
    again = ours.PeftModel.from_pretrained(LINEARS.model(FP64), tmp_path)
    assert torch.equal(run(again, LINEARS.given(FP64)), run(model, LINEARS.given(FP64)))
    for site in core.sites(again.get_base_model()):
        site.layer.reset_lora_parameters("default", True)
    assert_close(run(again, LINEARS.given(FP64)), run(LINEARS.model(FP64), LINEARS.given(FP64)), FP64)


def test_a_file_of_its_type_must_ask_for_it(tmp_path: Path) -> None:
    core.save_adapter(adapted("a"), tmp_path / "a", "a")
    path = tmp_path / "a" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "use_lora_xs": False}))
    with pytest.raises(AdapterFileError) as refused:
        read_config(tmp_path / "a")
    assert (refused.value.field, refused.value.what) == ("peft_type", "LORA_XS")


def test_a_plain_config_on_disk_is_as_before() -> None:
    assert "use_lora_xs" not in LoraConfig().as_json() and LoraConfig().as_json()["peft_type"] == "LORA"


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_sum_of_several_is_plain_lora(way: str) -> None:
    model, given = adapted("a", "b"), LINEARS.given(FP64)
    core.activate(model, "a", "b")
    before = run(model, given)
    wide = core.CombinationType(way, rank=8) if way == "svd" else way
    assert not core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way=wide).config.use_lora_xs
    with core.use(model, "sum"):
        assert_close(run(model, given), before, FP64)


def test_the_rank_is_at_most_the_smaller_side() -> None:
    model = LINEARS.model()
    before = snapshot(model)
    with pytest.raises(ConfigError) as refused:
        core.attach(model, LoraConfig(r=8, target_modules=["up", "out"], use_lora_xs=True), "a")
    assert (refused.value.what, refused.value.where, refused.value.field) == ("8", "out", "r")
    assert snapshot(model) == before
    core.attach(model, LoraConfig(r=7, target_modules=["out"], use_lora_xs=True), "a")


def test_a_weight_that_cannot_be_decomposed_is_refused() -> None:
    model = LINEARS.model()
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError) as refused:
        core.attach(model, LINEARS.config(use_lora_xs=True), "a")
    assert refused.value.where == "up"


@pytest.mark.parametrize("init", ["gaussian", False, "pissa", "mica"])
def test_an_init_of_A_and_B_is_refused(init: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        core.attach(LINEARS.model(), LINEARS.config(use_lora_xs=True, init_lora_weights=init), "a")
    assert refused.value.field == "init_lora_weights"


def test_kinds_without_one_matrix_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        core.attach(EMBEDDING.model(), EMBEDDING.config(use_lora_xs=True), "a")
    assert refused.value.field == "use_lora_xs"
