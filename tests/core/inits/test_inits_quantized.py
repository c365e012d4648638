"""Inits on quantized bases: those that keep the base are correct; those that would change it are rejected, or round it a
second time and report that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.peft as face
from lorakit.core import (
    attach,
    collect_for,
    detach,
    disable,
    load_adapter,
    merge,
    save_adapter,
    save_as_trained,
    sites,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.errors import AdapterError, ConfigError
from lorakit.plan.quantized import Storage

from ...laws.quantized import DENSE, EVALUATED, WRITTEN, packed_bits, specimen, storages
from ...laws.snapshots import same_bits
from ...laws.tolerances import assert_close
from ...laws.zoo import SETTINGS, Specimen, attach_fresh, randomise, run

EVERY = pytest.mark.parametrize("storage", storages())
FP32 = torch.float32
STAYS = (True, "gaussian", "orthogonal", "eva", "mica")
REFUSED = ("pissa", "pissa_niter_4", "corda", "loftq", "lora_ga")
TWICE = r"up: init_lora_weights='{}' changes the base weight, but the weight is quantized.*requantized.*before the base is quantized"


def fields_for(init: Any) -> dict[str, Any]:
    return {"init_lora_weights": init, **SETTINGS.get(str(init), {})}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y.square().mean()


def moved(kind: Specimen, **fields: Any) -> nn.Module:
    """An olora adapter with numbers of its own, and a plain one."""
    model = kind.model()
    attach(model, kind.config(init_lora_weights="olora", **fields), "moved")
    attach(model, kind.config(**fields), "plain")
    with torch.no_grad():
        for _, parameter in trainable_parameters(model, "moved"):
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    randomise(model, "plain", 8)
    return model


@EVERY
@pytest.mark.parametrize("init", STAYS, ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_one_that_leaves_the_base_alone_begins_as_the_base_trains_and_is_kept(
    init: Any, dora: bool, storage: Storage, tmp_path: Path
) -> None:
    kind = specimen(storage)
    model, given = kind.model(), kind.given()
    before, output = packed_bits(model), run(model, given)
    attach_fresh(model, kind, use_dora=dora, **fields_for(init))
    assert_close(run(model, given), output, FP32)
    assert packed_bits(model) == before
    factors = [site.layer.factor("default") for site in sites(model)]
    assert all(bool(factor.A.any()) != bool(factor.B.any()) or init == "orthogonal" for factor in factors)
    loss(model.train(), given).backward()
    gradients = [p.grad for _, p in trainable_parameters(model)]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients) and any(g.any() for g in gradients)
    randomise(model.eval(), "default", 3)
    save_adapter(model, tmp_path)
    again = kind.model()
    load_adapter(again, tmp_path)
    assert same_bits(run(again, given), run(model, given))
    detach(model)
    assert packed_bits(model) == before and same_bits(run(model, given), output)


@EVERY
def test_mica_takes_the_directions_of_the_weight_as_it_is_multiplied_out(storage: Storage) -> None:
    kind = specimen(storage)
    model = kind.model()
    attach(model, kind.config(init_lora_weights="mica"))
    for site in sites(model):
        W, B = site.layer.read(), site.layer.factor("default").B.detach()
        assert float((B.T @ W).norm() / B.norm()) < 1.5 * float(torch.linalg.svdvals(W)[-4:].norm())


@EVERY
@pytest.mark.parametrize("init", REFUSED)
def test_one_that_would_round_the_base_twice_is_refused_and_nothing_changes(init: str, storage: Storage) -> None:
    kind = specimen(storage)
    model, config = kind.model(), kind.config(**fields_for(init))
    before, output, names = packed_bits(model), run(model, kind.given()), [n for n, _ in model.named_modules()]
    text = TWICE.format("pissa" if init.startswith("pissa") else init)
    with pytest.raises(ConfigError, match=text):
        if init in ("corda", "lora_ga"):
            collect_for(model, config, [kind.given()], loss)
        else:
            attach(model, config)
    if init in ("corda", "lora_ga"):  # nor with what was collected on the plain base, which is the same one
        statistics = collect_for(DENSE.model(), config, [kind.given()], loss)
        with pytest.raises(ConfigError, match=text):
            attach(model, statistics.config, statistics=statistics)
    assert packed_bits(model) == before and [n for n, _ in model.named_modules()] == names
    assert same_bits(run(model, kind.given()), output)


@EVERY
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_olora_rounds_what_is_left_and_says_by_how_much(storage: Storage, dora: bool) -> None:
    kind = specimen(storage)
    model, given = kind.model(), kind.given()
    before, output = packed_bits(model), run(model, given)
    report = attach(model, kind.config(init_lora_weights="olora", use_dora=dora))
    lost = []
    for site in sites(model):
        layer: Any = site.layer
        factor, W = layer.factor("default"), layer.read()
        Q, R = torch.linalg.qr(W)
        torch.testing.assert_close(factor.B.detach() @ factor.A.detach(), Q[:, :4] @ R[:4], atol=1e-5, rtol=1e-4)
        left = W - factor.scale * (factor.B @ factor.A).detach()
        stored = layer.base.write(layer.source, layer.original(), left)
        now = layer.base.read(layer.source, layer.base.stored(layer.source, "weight"))
        assert torch.equal(now, layer.base.read(layer.source, stored))
        lost.append(float((now - left).norm() / left.norm()))
    assert 0 < max(lost) < WRITTEN[storage.name]
    assert f"with a relative error of up to {max(lost):.2g}" in report.notes[-1].text
    assert "olora changes base weights (sites: 2)" in report.notes[-2].text
    fresh = run(model, given)
    assert float((fresh - output).norm() / output.norm()) < 3 * WRITTEN[storage.name] + EVALUATED.get(storage.name, 0)
    assert packed_bits(model) == before  # the original is kept
    with disable(model):
        assert same_bits(run(model, given), output)
    detach(model)
    assert packed_bits(model) == before and same_bits(run(model, given), output)


@EVERY
@pytest.mark.parametrize("dense", [False, True], ids=["quantized", "dense"])
def test_olora_beside_a_plain_adapter_in_merges_and_out_of_them(storage: Storage, dense: bool) -> None:
    kind = specimen(storage)
    model, given = moved(kind), kind.given()
    base, alone = run(kind.model(), given), {}
    for name in ("moved", "plain"):
        with use(model, name):
            alone[name] = run(model, given)
    for merged in ("moved", "plain"):
        report = merge(model, merged, dense=dense)
        room = 1e-4 + EVALUATED.get(storage.name, 0) + (0 if dense else 4 * report.error)
        for name, expected in alone.items():
            with use(model, name):
                assert float((run(model, given) - expected).norm() / expected.norm()) <= room
        with disable(model):
            assert same_bits(run(model, given), base)
        unmerge(model)
        for name, expected in alone.items():
            with use(model, name):
                assert same_bits(run(model, given), expected)


@EVERY
def test_olora_is_written_as_it_is_trained_and_never_as_plain_lora(storage: Storage, tmp_path: Path) -> None:
    kind = specimen(storage)
    model, given = moved(kind), kind.given()
    with pytest.raises(
        AdapterError, match="up: olora changed a quantized weight, which had to be requantized, so adap"
    ):
        save_adapter(model, tmp_path / "plain", "moved")
    assert not (tmp_path / "plain").exists()
    save_as_trained(model, tmp_path / "trained", "moved")
    again = kind.model()
    assert load_adapter(again, tmp_path / "trained").base == "same"
    with use(model, "moved"):
        assert same_bits(run(again, given), run(model, given))


@EVERY
def test_the_face_writes_it_as_it_is_trained_with_a_word_and_converts_nothing(storage: Storage, tmp_path: Path) -> None:
    kind = specimen(storage)
    model = face.get_peft_model(kind.model(), kind.config(init_lora_weights="olora"))
    model.peft_config["default"].init_lora_weights = True  # PEFT's way to keep what an adapter begins with
    model.save_pretrained(tmp_path / "began")
    model.peft_config["default"].init_lora_weights = "olora"
    with pytest.warns(UserWarning, match="applies to a base that init_lora_weights='olora' changed"):
        model.save_pretrained(tmp_path / "trained")
    with pytest.raises(AdapterError, match="had to be requantized, so adapter 'default' is not plain LoRA"):
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "began"))
    loaded = face.PeftModel.from_pretrained(kind.model(), tmp_path / "trained")
    assert same_bits(run(loaded, kind.given()), run(model, kind.given()))
