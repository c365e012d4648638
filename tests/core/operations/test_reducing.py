"""A compressed adapter is the nearest of its rank, and the reported loss is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import attach, combine, compress, compress_folder, load_adapter, merged_state_dict, save_adapter, use
from lorakit.core.linalg import RankLimit
from lorakit.core.model.index import layers
from lorakit.core.operations.reducing import plain_weights
from lorakit.core.operations.tensor_sources import weights_of_model
from lorakit.core.operations.writing import put, reader_of
from lorakit.errors import AdapterError, ConfigError

from ...laws.snapshots import same_bits, snapshot
from ...laws.zoo import BERT, CONV1DS, EVERY_KIND, LINEARS, LLAMA, Specimen, randomise, run


def made(specimen: Specimen, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    model = specimen.model(dtype)
    attach(model, specimen.config(**fields), "a")
    randomise(model, "a", 5)
    return model


def delta(model: nn.Module, path: str, name: str) -> Tensor:
    factor = dict(layers(model))[path].factor(name)
    return (factor.B.double() @ factor.A.double() * factor.scale).detach()


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    r=st.integers(1, 9),
    rank=st.integers(1, 9),
    rslora=st.booleans(),
)
def test_to_a_rank_for_any_shape(shape: tuple[int, int], r: int, rank: int, rslora: bool) -> None:
    model = nn.Sequential(nn.Linear(*shape)).double()
    attach(model, LoraConfig(r=r, lora_alpha=7, use_rslora=rslora, target_modules=["0"]), "a")
    randomise(model, "a", r)
    report = compress(model, "a", rank=rank)
    U, S, Vh = torch.linalg.svd(delta(model, "0", "a"), full_matrices=False)
    expected = U[:, :rank] * S[:rank] @ Vh[:rank]
    torch.testing.assert_close(delta(model, "0", "compressed"), expected, atol=1e-8, rtol=1e-8)
    (site,) = report.sites
    assert (site.r_before, site.r) == (r, min(rank, r, *shape))
    assert site.norm == pytest.approx(float(S.norm()))
    assert site.energy_lost == pytest.approx(float(S[rank:].square().sum() / S.square().sum()), abs=1e-9)
    assert report.energy_lost == pytest.approx(site.energy_lost)


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS, EVERY_KIND, LLAMA], ids=str)
def test_to_a_share_of_the_energy(specimen: Specimen) -> None:
    model = made(specimen)
    report = compress(model, "a", energy=0.9)
    for site in report.sites:
        assert (0 < site.energy_lost <= 0.1) if site.r < 4 else site.energy_lost == 0.0
        apart = (delta(model, site.path, "compressed") - delta(model, site.path, "a")).square().sum()
        whole = delta(model, site.path, "a").square().sum()
        assert site.energy_lost == pytest.approx(float(apart / whole), rel=1e-6)
    assert 0 < report.energy_lost <= 0.1
    whole = compress(model, "a", "same", energy=1.0)
    assert whole.energy_lost == 0.0
    with use(model, "a"):
        expected = run(model, specimen.given(torch.float64))
    with use(model, "same"):
        torch.testing.assert_close(run(model, specimen.given(torch.float64)), expected)


def test_what_cat_made_larger_becomes_small_again() -> None:
    model = made(LINEARS)
    combine(model, ["a", "a"], [0.5, 0.5], "twice", way="cat")
    report = compress(model, "twice", energy=1.0)
    assert {(site.r_before, site.r) for site in report.sites} == {(8, 4)}
    torch.testing.assert_close(delta(model, "up", "compressed"), delta(model, "up", "a"))


def test_dora_keeps_its_magnitudes() -> None:
    model = made(LINEARS, use_dora=True)
    compress(model, "a", rank=2)
    layer = model.up
    assert torch.equal(layer.lora_magnitude_vector["compressed"].weight, layer.lora_magnitude_vector["a"].weight)
    compress(model, "a", "same", rank=4)
    with use(model, "a"):
        expected = run(model, LINEARS.given(torch.float64))
    with use(model, "same"):
        torch.testing.assert_close(run(model, LINEARS.given(torch.float64)), expected)


def test_copied_modules_come_along() -> None:
    model = made(BERT, torch.float32, modules_to_save=["classifier"])
    compress(model, "a", rank=1)
    held = model.classifier.modules_to_save
    assert same_bits(held["compressed"].weight, held["a"].weight)


def test_a_folder_is_compressed_without_its_base(tmp_path: Path) -> None:
    model = made(LLAMA, torch.float32, use_rslora=True)
    save_adapter(model, tmp_path / "a", "a", facts={"base_name": "tiny"})
    report = compress_folder(tmp_path / "a", tmp_path / "b", energy=0.8)
    loaded = load_adapter(model, tmp_path / "b", "b")
    assert loaded.base == "same" and loaded.warnings == ()
    for site in report.sites:
        apart = (delta(model, site.path, "b") - delta(model, site.path, "a")).square().sum()
        assert site.energy_lost == pytest.approx(float(apart / delta(model, site.path, "a").square().sum()), rel=1e-3)
    about = json.loads((tmp_path / "b" / "lorakit.json").read_text())
    assert about["operation"]["name"] == "compress" and about["operation"]["energy"] == 0.8
    assert about["operation"]["of"][0]["name"] == "a"
    (tmp_path / "b" / "lorakit.json").unlink()
    load_adapter(model, tmp_path / "b", "again")
    torch.testing.assert_close(
        delta(model, report.sites[0].path, "again"), delta(model, report.sites[0].path, "b"), rtol=0, atol=0
    )


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS], ids=str)
def test_dora_becomes_plain_lora(specimen: Specimen) -> None:
    model = made(specimen, use_dora=True)
    base = specimen.model(torch.float64).state_dict()
    plain, sites = plain_weights(weights_of_model(model, "a"), RankLimit(rank=20), reader_of(model))
    put(model, plain, "plain")
    assert not plain.config.use_dora and max(site.energy_lost for site in sites) < 1e-6
    for leaf in ("up.weight", "square.weight"):
        change = merged_state_dict(model, "a")[leaf] - base[leaf]
        found = merged_state_dict(model, "plain")[leaf] - base[leaf]
        torch.testing.assert_close(found, change, rtol=1e-4, atol=1e-5)
    _, sites = plain_weights(weights_of_model(model, "a"), RankLimit(rank=3), reader_of(model))
    for site in sites:
        stored = merged_state_dict(model, "a")[f"{site.path}.weight"] - base[f"{site.path}.weight"]
        S = torch.linalg.svdvals(stored)
        assert site.energy_lost == pytest.approx(float(S[3:].square().sum() / S.square().sum()), rel=1e-3)


def test_a_refused_call_changes_nothing() -> None:
    model = made(LINEARS, torch.float32)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="Adapter 'typo' not found"):
        compress(model, "typo", rank=1)
    with pytest.raises(AdapterError, match="already has an adapter 'a'"):
        compress(model, "a", "a", rank=1)
    with pytest.raises(ConfigError, match="either a rank or a fraction"):
        compress(model, "a")
    assert snapshot(model) == before
