"""Operations on bare parameters treat each expert as a separate weight: against dense updates in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.config import LoraConfig
from lorakit.core import (
    attach,
    combine,
    combine_folders,
    compare_adapters,
    compare_folders,
    compress,
    compress_folder,
    load_adapter,
    reduce_intruders,
    save_adapter,
)
from lorakit.core.model.index import layers
from lorakit.core.operations.combination_types import COMBINATION_TYPES, CombinationType
from lorakit.core.operations.tensor_sources import weights_of_folder
from lorakit.errors import AdapterError, AdapterFileError, ConfigError

from ...laws.snapshots import snapshot
from ...laws.zoo import EXPERTS, LINEARS, MIXTRAL, Specimen, randomise
from .experts import deltas, experts, factors, made, norms, scale, total, weights
from .test_reducing_intruders import by_hand
from .updates import effect, nearest, same

BARE = (EXPERTS, MIXTRAL)


@pytest.mark.parametrize("specimen", BARE, ids=str)
def test_cat_is_the_sum_at_every_expert(specimen: Specimen) -> None:
    model = made(specimen, "a", "b", "d")
    by = {"a": 0.7, "b": -1.3, "d": 2.0}
    report = combine(model, list(by), list(by.values()), "sum", way="cat")
    same(deltas(model, "sum"), total(model, by))
    assert report.deviation < 1e-12
    first = specimen.parameters[0].rpartition(".")[2]
    assert all(layer.r["sum"] == (11 if layer.spec.parameter == first else 9) for _, layer in layers(model))
    assert {site.path: site.r for site in report.sites} == {path: layer.r["sum"] for path, layer in layers(model)}
    combine(model, ["a", "b"], [1.0, 1.0], "both", way="cat")
    torch.testing.assert_close(effect(model, specimen, "both"), effect(model, specimen, "a", "b"))


@pytest.mark.parametrize("specimen", BARE, ids=str)
def test_svd_is_the_nearest_at_every_expert(specimen: Specimen) -> None:
    model = made(specimen, "a", "b")
    report = combine(model, ["a", "b"], [0.5, 2.0], "near", way=CombinationType("svd", rank=3))
    wanted, found = total(model, {"a": 0.5, "b": 2.0}), deltas(model, "near")
    same(found, {where: nearest(delta, 3) for where, delta in wanted.items()}, 1e-8)
    whole, apart = norms(model, wanted), norms(model, {where: found[where] - wanted[where] for where in found})
    for site in report.sites:
        assert (site.r, site.r_before) == (3, 6)
        assert site.norm == pytest.approx(whole[site.path])
        assert site.deviation == pytest.approx(apart[site.path] / whole[site.path])


@pytest.mark.parametrize("specimen", BARE, ids=str)
@pytest.mark.parametrize("way", COMBINATION_TYPES)
def test_every_way_treats_an_expert_as_a_weight_of_its_own(specimen: Specimen, way: str) -> None:
    """The same factors on dense layers, one for each expert, give the same result, including random pruning."""
    model = made(specimen, "a", "c")
    how = CombinationType(
        way, density=None if way in ("svd", "linear", "cat") else 0.6, clamp=0.99 if "svd" in way else None, seed=5
    )
    combine(model, ["a", "c"], [0.7, -1.2], "sum", way=how)
    held = {name: factors(model, name) for name in "ac"}
    dense = nn.ModuleDict()
    for number, (A, B) in enumerate(held["a"].values()):
        dense[f"w{number:02d}"] = nn.Linear(A.shape[1], B.shape[0], bias=False).double()
    for name in "ac":
        attach(dense, LoraConfig(r=4, lora_alpha=4 * scale(model, name), target_modules=list(dense)), name)
        for layer, (A, B) in zip(list(dense.values()), held[name].values(), strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A.clone(), B.clone()
    combine(dense, ["a", "c"], [0.7, -1.2], "sum", way=how)
    for found, expected in zip(deltas(model, "sum").values(), deltas(dense, "sum").values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_pruned_updates_against_the_formula() -> None:
    """magnitude_prune_svd by hand: the largest values of each expert's Δ are kept, for each expert separately."""
    model = made(EXPERTS, "a", "b")
    combine(model, ["a", "b"], [1.0, 0.5], "sum", way=CombinationType("magnitude_prune_svd", rank=4, density=0.3))
    one, other, found = deltas(model, "a"), deltas(model, "b"), deltas(model, "sum")
    for where, delta in found.items():
        kept = 0
        for weight, update in ((1.0, one[where]), (0.5, other[where])):
            smallest = update.abs().flatten().sort(descending=True).values[int(0.3 * update.numel()) - 1]
            kept = kept + weight * update * (update.abs() >= smallest)
        torch.testing.assert_close(delta, nearest(kept, 4), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("specimen", BARE, ids=str)
def test_to_a_rank_and_to_a_share_of_the_energy(specimen: Specimen) -> None:
    model = made(specimen, "a")
    compress(model, "a", "two", rank=2)
    whole = deltas(model, "a")
    same(deltas(model, "two"), {where: nearest(delta, 2) for where, delta in whole.items()}, 1e-8)
    report = compress(model, "a", "share", energy=0.9)
    found = deltas(model, "share")
    by_path, lost = norms(model, whole), norms(model, {where: found[where] - whole[where] for where in found})
    for site in report.sites:
        layer = dict(layers(model))[site.path]
        held = sum(torch.linalg.svdvals(whole[where]).square() for where in experts(site.path, layer)).cumsum(0)
        assert site.r == 1 + int((held < 0.9 * held[-1]).sum()) == layer.r["share"]
        assert site.r_before == 4 and site.norm == pytest.approx(by_path[site.path])
        assert site.energy_lost == pytest.approx((lost[site.path] / by_path[site.path]) ** 2, abs=1e-12)


@pytest.mark.parametrize("specimen", BARE, ids=str)
def test_compared_expert_by_expert(specimen: Specimen) -> None:
    model = made(specimen, "a", "b")
    with torch.no_grad():  # an expert that the second adapter does not change has no output space, and no angles
        for _, layer in layers(model):
            if layer.spec.experts:
                layer.lora_B["b"].weight[:, :: layer.spec.experts] = 0
    one, other = deltas(model, "a"), deltas(model, "b")
    sizes, others = norms(model, one), norms(model, other)
    report = compare_adapters(model, "a", "b")
    for site in report.sites:
        layer = dict(layers(model))[site.path]
        dot, squares = 0.0, []
        for where in experts(site.path, layer):
            dot += float((one[where] * other[where]).sum())
            ranks = [int(torch.linalg.matrix_rank(d[where])) for d in (one, other)]
            P, Q = (torch.linalg.svd(d[where]).U[:, :r] for d, r in zip((one, other), ranks, strict=True))
            squares += torch.linalg.svdvals(P.T @ Q).square().tolist()
        assert site.ranks == (4, 2)
        assert site.norms == pytest.approx((sizes[site.path], others[site.path]))
        assert site.cosine == pytest.approx(dot / sizes[site.path] / others[site.path])
        assert len(site.output_angles) == len(squares) == 2 * max(1, layer.spec.experts - 1)
        assert site.output_overlap == pytest.approx(sum(squares) / len(squares))
    assert not report.only_first and not report.only_second


@pytest.mark.parametrize("specimen", BARE, ids=str)
@pytest.mark.parametrize("threshold", [0.6, 999.0])
def test_intruders_of_each_expert(specimen: Specimen, threshold: float) -> None:
    model = made(specimen, "c")
    told = reduce_intruders(model, "c", top=5, threshold=threshold, keep=0.3)
    changes, W, found = deltas(model, "c"), weights(model), deltas(model, "intruder_reduced")
    seen = []
    for site in told:
        where = experts(site.path, dict(layers(model))[site.path])[site.expert or 0]
        expected, indices = by_hand(W[where], changes[where], 4, 5, threshold, 0.3)
        assert list(site.indices) == indices and 0 <= site.energy_lost < 1
        torch.testing.assert_close(found[where], expected, rtol=1e-7, atol=1e-7)
        seen.append(where)
    assert sorted(seen) == sorted(found)


# --- on disk


@pytest.mark.parametrize("specimen", BARE, ids=str)
def test_folders_do_not_need_the_base(specimen: Specimen, tmp_path: Path) -> None:
    model = made(specimen, "a", "b", dtype=torch.float32)
    for name in "ab":
        save_adapter(model, tmp_path / name, name)
    combine_folders([tmp_path / "a", tmp_path / "b"], [0.5, -1.0], tmp_path / "sum", way="cat")
    loaded = load_adapter(model, tmp_path / "sum", "sum")
    assert (loaded.base, loaded.warnings) == ("same", ())
    same(deltas(model, "sum"), total(model, {"a": 0.5, "b": -1.0}), 1e-5)
    compress_folder(tmp_path / "sum", tmp_path / "less", energy=0.7)
    (tmp_path / "less" / "lorakit.json").unlink()  # as another program reads it
    load_adapter(model, tmp_path / "less", "less")
    compress(model, "sum", "direct", energy=0.7)
    same(deltas(model, "less"), deltas(model, "direct"), 1e-4)
    found, direct = compare_folders(tmp_path / "a", tmp_path / "b"), compare_adapters(model, "a", "b")
    assert [s.path for s in found.sites] == [s.path for s in direct.sites]
    assert found.cosine == pytest.approx(direct.cosine)


def test_parameters_that_files_cannot_tell_apart_get_one_rank(tmp_path: Path) -> None:
    """Without a model it is unknown which of two tensors is `up`, so no pattern can give them different ranks."""
    model = made(EXPERTS, "a", dtype=torch.float32, rank_pattern={})
    with torch.no_grad():
        factor = dict(layers(model))["experts"].factor("a")  # the square matrix, which gets rank 1
        factor.B[:, 1:] = 0
    save_adapter(model, tmp_path / "a", "a")
    report = compress_folder(tmp_path / "a", tmp_path / "less", energy=1.0)
    assert {site.path: site.r for site in report.sites} == {"down": 4, "experts": 1, "experts.base_layer": 4}
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "less" / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.experts.lora_A.weight"] == (4, 20)
    load_adapter(model, tmp_path / "less", "less")
    same(deltas(model, "less"), deltas(model, "a"), 1e-5)
    on_model = compress(model, "a", "known", energy=1.0)
    assert on_model.config.rank_pattern == {"experts.square": 1}
    same(deltas(model, "known"), deltas(model, "a"), 1e-5)


def test_adapters_on_different_parameters_are_combined_on_their_model(tmp_path: Path) -> None:
    """One adapts `square` alone and one both: the same path on disk means different parameters."""
    model = EXPERTS.model(torch.float64)
    chosen = {"square": ["experts.square"], "both": ["experts.up", "experts.square"], "up": ["experts.up"]}
    for number, (name, entries) in enumerate(chosen.items()):
        attach(model, LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=entries), name)
        randomise(model, name, number)
    for name, pair in (("s", ["square", "both"]), ("u", ["up", "both"]), ("su", ["square", "up"])):
        report = combine(model, pair, [1.0, -2.0], name, way="cat")
        same(deltas(model, name), total(model, dict(zip(pair, [1.0, -2.0], strict=True))))
        assert report.config.target_modules == set()
        assert set(report.config.target_parameters) == {"experts.up", "experts.square"}
        save_adapter(model, tmp_path / name, name)
        load_adapter(model, tmp_path / name, f"{name}2")
        same(deltas(model, f"{name}2"), deltas(model, name))
    for name in chosen:
        save_adapter(model, tmp_path / name, name)
    for pair in (["square", "both"], ["square", "up"]):
        said = r"different parameters of experts \(experts\.square, experts\.up\), and the files do not show"
        with pytest.raises(AdapterError, match=said):
            combine_folders([tmp_path / name for name in pair], [1.0, 1.0], tmp_path / "x")
        with pytest.raises(AdapterError, match=said):
            compare_folders(*(tmp_path / name for name in pair))
    found = compare_adapters(model, "square", "both")
    assert [site.path for site in found.sites] == ["experts"] and found.only_second == ("experts.base_layer",)


def test_experts_and_modules_become_one(tmp_path: Path) -> None:
    model = MIXTRAL.model(torch.float64)
    attach(model, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]), "dense")
    attach(model, MIXTRAL.config(r=3, target_modules=[]), "experts")
    for number, name in enumerate(("dense", "experts")):
        randomise(model, name, number)
        save_adapter(model, tmp_path / name, name)
    report = combine(model, ["dense", "experts"], [1.0, 1.0], "both", way="cat")
    assert report.config.target_modules == {"q_proj"}
    assert report.config.target_parameters == sorted(MIXTRAL.parameters)
    torch.testing.assert_close(effect(model, MIXTRAL, "both"), effect(model, MIXTRAL, "dense", "experts"))
    combine_folders([tmp_path / "dense", tmp_path / "experts"], [1.0, 1.0], tmp_path / "both", way="cat")
    load_adapter(model, tmp_path / "both", "again")
    torch.testing.assert_close(effect(model, MIXTRAL, "again"), effect(model, MIXTRAL, "both"))


# --- errors


def test_what_cannot_be_combined() -> None:
    model = EXPERTS.model()
    attach(model, EXPERTS.config(), "bare")
    attach(model, EXPERTS.config(r=2), "small")
    before = snapshot(model)
    with pytest.raises(ConfigError, match="must have the same r value"):
        combine(model, ["bare", "small"], [1.0, 1.0], "x", way="linear")
    assert snapshot(model) == before
    mixed = MIXTRAL.model()
    attach(mixed, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "dora")
    attach(mixed, MIXTRAL.config(target_modules=[]), "bare")
    attach(mixed, LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "biased")
    with pytest.raises(AdapterError, match=r"dora uses DoRA, but bare adapts bare parameters .* do not support"):
        combine(mixed, ["bare", "dora"], [1.0, 1.0], "x", way="cat")
    with pytest.raises(AdapterError, match=r"biased has a bias on B \(lora_bias\), but bare adapts bare parameters"):
        combine(mixed, ["biased", "bare"], [1.0, 1.0], "x", way="cat")


def test_a_module_and_its_parameter_are_not_one_site(tmp_path: Path) -> None:
    one, other = LINEARS.model(), LINEARS.model()
    attach(one, LoraConfig(r=2, target_modules=["up"]), "a")
    attach(other, LoraConfig(r=2, target_modules=[], target_parameters=["up.weight"]), "a")
    save_adapter(one, tmp_path / "whole", "a")
    save_adapter(other, tmp_path / "bare", "a")
    with pytest.raises(AdapterError, match="One adapter adapts up, and another a parameter of it"):
        combine_folders([tmp_path / "whole", tmp_path / "bare"], [1.0, 1.0], tmp_path / "x")


def test_what_files_do_not_say(tmp_path: Path) -> None:
    model = made(EXPERTS, "a", dtype=torch.float32, r=2, rank_pattern={"experts.up": 4})
    save_adapter(model, tmp_path / "a", "a")
    assert weights_of_folder(tmp_path / "a").factors["experts.base_layer"].experts == 3
    (tmp_path / "a" / "lorakit.json").unlink()
    with pytest.raises(AdapterFileError, match=r"rank and alpha at experts(\.base_layer)? depend on which parameter"):
        compress_folder(tmp_path / "a", tmp_path / "x", rank=1)
    wide = EXPERTS.model()
    attach(wide, LoraConfig(r=2, target_modules=r".*nothing|other|down", target_parameters=["up"]), "b")
    save_adapter(wide, tmp_path / "b", "b")
    with pytest.raises(AdapterFileError, match=r"names 'up' without its module, and target_modules is '.*nothing"):
        compress_folder(tmp_path / "b", tmp_path / "x", rank=1)
    assert not (tmp_path / "x").exists()


def test_a_file_whose_experts_do_not_fit_is_refused(tmp_path: Path) -> None:
    model = made(EXPERTS, "a", dtype=torch.float32)
    save_adapter(model, tmp_path / "a", "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.experts.base_layer.lora_B.weight"] = torch.zeros(20, 4)
    save_file(tensors, path)
    (tmp_path / "a" / "lorakit.json").unlink()
    with pytest.raises(AdapterFileError, match=r"A and B of experts\.base_layer have incompatible shapes: \(12, 12\)"):
        weights_of_folder(tmp_path / "a")


def test_the_adapter_stays_as_it_is() -> None:
    model = made(MIXTRAL, "a", "b")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    combine(model, ["a", "b"], [1.0, 1.0], "sum")
    compress(model, "a", "less", rank=1)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert dataclasses.asdict(compress(model, "a", "again", rank=1).sites[0])["r"] == 1


def test_a_site_of_many_experts_makes_no_dense_update() -> None:
    """The whole update of 40 experts of 64 × 48 has 122,880 elements; the largest created tensor has a third of that."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(1).expand(40, 64, 48), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = nn.Sequential(Many())
    for name in "ab":
        attach(model, LoraConfig(r=2, target_modules=[], target_parameters=["0.down_proj"]), name)
        randomise(model, name, ord(name))
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            parts = made if isinstance(made, (tuple, list)) else (made,)
            sizes.extend(t.numel() for t in parts if isinstance(t, torch.Tensor))
            return made

    for way in ("cat", "svd", "linear", "ties", "ties_svd"):
        sizes.clear()
        with Watch():
            combine(
                model, ["a", "b"], [1.0, 1.0], way, way=CombinationType(way, density=0.5 if "ties" in way else None)
            )
        assert max(sizes) <= 40 * 64 * 16
    sizes.clear()
    with Watch():
        compress(model, "a", rank=1)
        compare_adapters(model, "a", "b")
    assert max(sizes) <= 40 * 64 * 16
