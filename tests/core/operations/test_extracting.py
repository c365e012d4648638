"""An extracted adapter is the nearest low-rank change at each site; every other change is reported."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import (
    RankLimit,
    attach,
    extract,
    extract_to_folder,
    load_adapter,
    merge_and_unload,
    source_of_folder,
    source_of_model,
    use,
)
from lorakit.core.model.index import layers
from lorakit.errors import AdapterError, ConfigError, ModelError, NotYetSupported, TargetError

from ...laws.snapshots import snapshot
from ...laws.zoo import (
    BERT,
    CONV1DS,
    EVERY_KIND,
    EXPERTS,
    GPT2,
    LINEARS,
    LLAMA,
    MIXTRAL,
    TIED,
    Specimen,
    randomise,
    run,
)
from .experts import deltas, experts, weights


def delta(model: nn.Module, path: str, name: str = "extracted") -> Tensor:
    factor = dict(layers(model))[path].factor(name)
    return (factor.B.double() @ factor.A.double() * factor.scale).detach()


def tuned_by_rank(specimen: Specimen, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model whose weights at the targets have changed by a matrix of rank 4."""
    model = specimen.model(dtype)
    attach(model, specimen.config(), "a")
    randomise(model, "a", 3)
    merge_and_unload(model)
    return model


def tuned_everywhere(specimen: Specimen, dtype: torch.dtype = torch.float64) -> nn.Module:
    model, generator = specimen.model(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS, EVERY_KIND, GPT2, EXPERTS, MIXTRAL], ids=str)
def test_a_change_of_low_rank_is_found_again(specimen: Specimen) -> None:
    base, tuned = specimen.model(torch.float64), tuned_by_rank(specimen)
    report = extract(base, tuned, specimen.config(), rank=4)
    assert report.captured == pytest.approx(1)
    assert report.outside == ()
    assert all(site.energy_lost < 1e-12 for site in report.sites)
    torch.testing.assert_close(run(base, specimen.given(torch.float64)), run(tuned, specimen.given(torch.float64)))


@pytest.mark.parametrize("specimen", [LINEARS, EVERY_KIND], ids=str)
def test_what_is_left_out_is_reported(specimen: Specimen) -> None:
    base, tuned = specimen.model(torch.float64), tuned_everywhere(specimen)
    before, after = (dict(m.named_parameters()) for m in (specimen.model(torch.float64), tuned))
    report = extract(base, tuned, specimen.config(), rank=2)
    for site in report.sites:
        change = (after[f"{site.path}.weight"] - before[f"{site.path}.weight"]).detach()
        change = change.T if dict(layers(base))[site.path].kind_name != "Linear" else change
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        torch.testing.assert_close(delta(base, site.path), U[:, :2] * S[:2] @ Vh[:2])
        assert site.norm == pytest.approx(float(S.norm()))
        assert site.energy_lost == pytest.approx(float(S[2:].square().sum() / S.square().sum()))
    sites = {f"{site.path}.weight" for site in report.sites}
    assert {change.name for change in report.outside} == set(after) - sites
    for change in report.outside:
        assert change.norm == pytest.approx(float((after[change.name] - before[change.name]).detach().norm()))
    assert 0 < report.captured < 1


def test_a_share_of_the_energy_gives_each_site_its_rank(tmp_path: Path) -> None:
    base, tuned = LINEARS.model(torch.float64), tuned_everywhere(LINEARS)
    report = extract(base, tuned, LINEARS.config(), energy=0.9)
    assert all(site.energy_lost <= 0.1 for site in report.sites)
    ranks = {site.path: site.r for site in report.sites}
    assert {path: layer.r["extracted"] for path, layer in layers(base)} == ranks
    assert all(layer.scaling["extracted"] == 1 for _, layer in layers(base))


def test_modules_are_taken_over_whole() -> None:
    base, tuned = BERT.model(), tuned_everywhere(BERT, torch.float32)
    report = extract(base, tuned, BERT.config(modules_to_save=["classifier"]), rank=16)
    assert report.copied == ("classifier",)
    assert not any(change.name.startswith("classifier") for change in report.outside)
    assert torch.equal(base.classifier.modules_to_save["extracted"].weight, tuned.classifier.weight)


def test_a_tied_weight_counts_once() -> None:
    base, tuned = TIED.model(), tuned_everywhere(TIED, torch.float32)
    report = extract(base, tuned, TIED.config(), rank=2)
    names = [change.name for change in report.outside]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_files_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Sharded files, a prefix that the files omit, modules on the meta device, and a tensor of no module."""
    base, tuned = GPT2.model(), tuned_by_rank(GPT2, torch.float32)
    (tmp_path / "tuned").mkdir()
    tensors = {name: t.clone() for name, t in tuned.state_dict().items() if name != "lm_head.weight"}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        shard = {name.removeprefix("transformer."): tensors[name] for name in part}
        save_file(
            {**shard, **({"extra": torch.zeros(2)} if number else {})}, tmp_path / "tuned" / f"m-{number}.safetensors"
        )
    source = source_of_folder(tmp_path / "tuned")
    skeleton = copy.deepcopy(base).to("meta")
    skeleton.tie_weights()
    report = extract_to_folder(
        skeleton,
        source_of_model(base, "base"),
        source,
        GPT2.config(),
        tmp_path / "adapter",
        cut=RankLimit(rank=4),
    )
    assert [(change.name, change.why) for change in report.outside] == [("extra", f"only in {tmp_path / 'tuned'}")]
    load_adapter(base, tmp_path / "adapter", "found")
    with use(base, "found"):
        torch.testing.assert_close(run(base, GPT2.given()), run(tuned, GPT2.given()), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_extracted(tmp_path: Path) -> None:
    base = LINEARS.model()
    before = snapshot(base)
    tuned = tuned_everywhere(LINEARS, torch.float32)
    wider = nn.Sequential()
    for name, module in tuned.named_children():
        wider.add_module(name, module)
    wider.up = nn.Linear(12, 21)
    cases = (
        (
            {"tuned": wider},
            ModelError,
            r"up\.weight has shape \(20, 12\) in the base and \(21, 12\) in the fine-tuned model",
        ),
        (
            {"tuned": nn.Sequential(nn.Linear(2, 2))},
            ModelError,
            "the fine-tuned model has no tensor (up|square).weight",
        ),
        ({"config": LINEARS.config(use_dora=True)}, ConfigError, "leave use_dora out"),
        ({"config": LINEARS.config(bias="all")}, ConfigError, "must be 'none'"),
        ({"config": LINEARS.config(target_modules=["typo"])}, TargetError, "typo"),
        ({"rank": None}, ConfigError, "either a rank or a fraction"),
        ({"name": "x.y"}, AdapterError, "cannot be an adapter's name"),
    )
    for change, error, said in cases:
        given = {"tuned": tuned, "config": LINEARS.config(), "rank": 2, **change}
        with pytest.raises(error, match=said):
            extract(base, given.pop("tuned"), given.pop("config"), **given)
    assert snapshot(base) == before
    with pytest.raises(ModelError, match="no safetensors files found"):
        source_of_folder(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        source_of_folder(tmp_path)


def test_a_resized_vocabulary_is_told() -> None:
    base, tuned = EVERY_KIND.model(), tuned_everywhere(EVERY_KIND, torch.float32)
    tuned.embed = nn.Embedding(60, 12)
    report = extract(base, tuned, LoraConfig(target_modules=["linear"]), rank=2)
    assert ("embed.weight", None, "(50, 12) before, (60, 12) after") in [
        (change.name, change.norm, change.why) for change in report.outside
    ]


@pytest.mark.parametrize("specimen", [EXPERTS, MIXTRAL], ids=str)
def test_each_expert_has_its_own_change(specimen: Specimen) -> None:
    base, tuned = specimen.model(torch.float64), tuned_everywhere(specimen)
    report = extract(base, tuned, specimen.config(), rank=2)
    attach(tuned, specimen.config(), "there")
    changes = {where: after - weights(base)[where] for where, after in weights(tuned).items()}
    found = deltas(base, "extracted")
    assert found.keys() == changes.keys()
    for site in report.sites:
        names = experts(site.path, dict(layers(base))[site.path])
        S = [torch.linalg.svdvals(changes[where]) for where in names]
        energy, lost = (sum(float(s[first:].square().sum()) for s in S) for first in (0, 2))
        assert (site.norm, site.energy_lost) == (pytest.approx(energy**0.5), pytest.approx(lost / energy))
        for where in names:
            U, s, Vh = torch.linalg.svd(changes[where], full_matrices=False)
            torch.testing.assert_close(found[where], U[:, :2] * s[:2] @ Vh[:2])


@pytest.mark.parametrize("specimen", [EXPERTS, MIXTRAL], ids=str)
def test_experts_have_one_rank_for_a_share_of_the_energy(specimen: Specimen) -> None:
    base, tuned = specimen.model(torch.float64), tuned_everywhere(specimen)
    report = extract(base, tuned, specimen.config(), energy=0.8)
    attach(tuned, specimen.config(), "there")
    changes = {where: after - weights(base)[where] for where, after in weights(tuned).items()}
    for site in report.sites:
        names = experts(site.path, dict(layers(base))[site.path])
        held = sum(torch.linalg.svdvals(changes[where]).square() for where in names).cumsum(0)
        assert site.r == 1 + int((held < 0.8 * held[-1]).sum())
        assert site.energy_lost == pytest.approx(float(1 - held[site.r - 1] / held[-1]))


def test_experts_are_read_from_files_one_by_one(tmp_path: Path) -> None:
    base, tuned = EXPERTS.model(), tuned_by_rank(EXPERTS, torch.float32)
    for name, model in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({key: t.clone() for key, t in model.state_dict().items()}, tmp_path / name / "model.safetensors")
    source = source_of_folder(tmp_path / "tuned")
    assert torch.equal(source.read_one("experts.up", 2), tuned.experts.up[2])

    def whole(name: str) -> Tensor:
        assert name != "experts.up", "three experts at once"
        return source.read(name)

    sources = source_of_folder(tmp_path / "base"), dataclasses.replace(source, read=whole)
    skeleton = copy.deepcopy(base).to("meta")
    config = EXPERTS.config(target_parameters=["experts.up"], target_modules=[])
    with pytest.raises(AssertionError, match="three experts at once"):  # to report changes outside
        extract_to_folder(
            skeleton, *sources, EXPERTS.config(target_parameters=["square"]), tmp_path / "x", cut=RankLimit(4)
        )
    report = extract_to_folder(skeleton, *sources, config, tmp_path / "adapter", cut=RankLimit(rank=4))
    assert {change.name for change in report.outside} == {"experts.square", "down.weight"}
    load_adapter(base, tmp_path / "adapter", "found")
    attach(tuned, EXPERTS.config(), "there")
    for where, delta in deltas(base, "found").items():
        change = weights(tuned)[where] - weights(base)[where]
        torch.testing.assert_close(delta, change, rtol=1e-3, atol=1e-4)


def test_layers_that_are_stacked_anew_are_refused_with_the_way_out() -> None:
    ranges = [(0, 2), (1, 2)]
    model, stacked = LLAMA.model(), LLAMA.model()
    before = snapshot(model)
    said = r"layer_replication: nothing can be extracted .*attach a new adapter"
    with pytest.raises(ConfigError, match=said):
        extract(model, LLAMA.model(), LLAMA.config(layer_replication=ranges), rank=2)
    assert snapshot(model) == before
    attach(stacked, LLAMA.config(layer_replication=ranges), "a")
    with pytest.raises(ConfigError, match=said):
        extract(stacked, LLAMA.model(), LLAMA.config(), rank=2)
    merge_and_unload(stacked, untie=True)
    plain, tuned = stacked, copy.deepcopy(stacked)
    with torch.no_grad():
        tuned.model.layers[2].self_attn.q_proj.weight[0] += 1.0
    report = extract(plain, tuned, LLAMA.config(), rank=1)
    assert [site.path for site in report.sites if site.norm] == ["model.layers.2.self_attn.q_proj"]
    assert report.captured == pytest.approx(1)


def test_a_grouped_convolution_has_no_change_of_its_form() -> None:
    base, tuned = (nn.Sequential(nn.Conv1d(4, 8, 3, groups=2)) for _ in range(2))
    with pytest.raises(NotYetSupported, match="grouped convolution"):
        extract(base, tuned, LoraConfig(target_modules=["0"]), rank=1)
