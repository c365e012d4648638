"""Cosines, norms and angles from factors equal those of the dense updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import attach, compare_adapters, compare_folders, rescale, save_adapter
from lorakit.core.model.index import layers
from lorakit.core.operations.comparing import compare_weights
from lorakit.core.operations.tensor_sources import weights_of_model
from lorakit.errors import AdapterError

from ...laws.snapshots import snapshot
from ...laws.zoo import EVERY_KIND, GPT2, LLAMA, Specimen, randomise, with_adapters


def delta(model: nn.Module, path: str, name: str) -> Tensor:
    factor = dict(layers(model))[path].factor(name)
    return (factor.B.double() @ factor.A.double() * factor.scale).detach()


def projector(delta: Tensor, rank: int) -> Tensor:
    U = torch.linalg.svd(delta, full_matrices=False).U[:, :rank]
    return U @ U.T


@pytest.mark.parametrize("specimen", [EVERY_KIND, GPT2], ids=str)
def test_against_the_dense_updates(specimen: Specimen) -> None:
    model = specimen.model(torch.float64)
    attach(model, specimen.config(use_rslora=True), "a")
    attach(model, specimen.config(r=2), "b")
    for number, name in enumerate("ab"):
        randomise(model, name, number)
    before = snapshot(model)
    found = compare_adapters(model, "a", "b")
    assert snapshot(model) == before
    assert found.names == ("a", "b") and not found.only_first and not found.only_second and not found.in_part
    flat = []
    for site in found.sites:
        one, other = delta(model, site.path, "a"), delta(model, site.path, "b")
        flat.append((one.flatten(), other.flatten()))
        assert site.ranks == (4, 2)
        assert site.norms == pytest.approx((float(one.norm()), float(other.norm())))
        assert site.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-9)
        for side, angles, overlap in (
            (lambda t: t, site.output_angles, site.output_overlap),
            (lambda t: t.T, site.input_angles, site.input_overlap),
        ):
            P, Q = projector(side(one), 4), projector(side(other), 2)
            assert overlap == pytest.approx(float(torch.trace(P @ Q)) / 2)
            cosines = torch.linalg.svdvals(P @ Q)[:2].clamp(max=1)
            assert sorted(angles) == list(angles) == pytest.approx(torch.rad2deg(cosines.acos()).tolist(), abs=1e-4)
    one, other = (torch.cat(part) for part in zip(*flat, strict=True))
    assert found.cosine == pytest.approx(float(one @ other / one.norm() / other.norm()))
    assert found.norms == pytest.approx((float(one.norm()), float(other.norm())))


def test_the_same_the_opposite_and_nothing() -> None:
    model = with_adapters(EVERY_KIND, "a")
    attach(model, EVERY_KIND.config(), "fresh")
    rescale(model, "a", -2.0, "opposite")
    same, opposite = compare_adapters(model, "a", "a"), compare_adapters(model, "a", "opposite")
    assert same.cosine == pytest.approx(1) and opposite.cosine == pytest.approx(-1)
    assert all(site.output_overlap == pytest.approx(1) for site in (*same.sites, *opposite.sites))
    assert all(max(site.output_angles) < 1e-3 for site in same.sites)
    fresh = compare_adapters(model, "a", "fresh")
    assert (fresh.cosine, fresh.norms[1]) == (0, 0)
    assert all((site.ranks[1], site.output_angles, site.output_overlap) == (0, (), 0.0) for site in fresh.sites)


def test_sites_that_only_one_has_count_in_the_whole() -> None:
    model = LLAMA.model()
    attach(model, LLAMA.config(target_modules=["q_proj", "v_proj"]), "a")
    attach(model, LLAMA.config(target_modules=["q_proj", "down_proj"]), "b")
    for number, name in enumerate("ab"):
        randomise(model, name, number)
    found = compare_adapters(model, "a", "b")
    assert {path.rpartition(".")[2] for path in found.only_first} == {"v_proj"}
    assert {path.rpartition(".")[2] for path in found.only_second} == {"down_proj"}
    whole = sum(float(delta(model, path, "a").square().sum()) for path in [s.path for s in found.sites])
    whole += sum(float(delta(model, path, "a").square().sum()) for path in found.only_first)
    assert found.norms[0] == pytest.approx(whole**0.5)


def test_folders_with_what_is_known_of_their_bases(tmp_path: Path) -> None:
    model = with_adapters(LLAMA, "a", "b")
    for name in "ab":
        save_adapter(model, tmp_path / name, name)
    found = compare_folders(tmp_path / "a", tmp_path / "b")
    on_model = compare_adapters(model, "a", "b")
    assert found.base == "same" and on_model.base == "unverifiable"
    assert found.cosine == pytest.approx(on_model.cosine)
    assert dataclasses.asdict(found.sites[0])["path"] == on_model.sites[0].path
    other = LLAMA.model(seed=9)
    attach(other, LLAMA.config(), "c")
    save_adapter(other, tmp_path / "c", "c")
    assert compare_folders(tmp_path / "a", tmp_path / "c").base == "different"


def test_modules_that_an_adapter_brings_do_not_make_another_base(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        model = LLAMA.model()
        with torch.no_grad():
            model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
        attach(model, LLAMA.config(modules_to_save=["lm_head"]), name)
        save_adapter(model, tmp_path / name, name)
    assert compare_folders(tmp_path / "a", tmp_path / "b").base == "same"


def test_other_shapes_are_refused_by_name() -> None:
    wide, narrow = nn.Sequential(nn.Linear(5, 4)), nn.Sequential(nn.Linear(6, 4))
    for model in (wide, narrow):
        attach(model, LoraConfig(target_modules=["0"]), "a")
    with pytest.raises(AdapterError, match="at 0, they change weights of different shapes: 4 × 5 and 4 × 6"):
        compare_weights(weights_of_model(wide, "a"), weights_of_model(narrow, "a"))
