"""What is extracted is the nearest low-rank change at each site; everything else that changed is reported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import (
    Cut,
    attach,
    extract,
    extract_to_folder,
    load_adapter,
    merge_and_unload,
    source_of_folder,
    source_of_model,
    use,
)
from lorakit.core.layering.sitemap import layers
from lorakit.errors import AdapterError, ConfigError, ModelError, TargetError

from ...laws.snapshots import snapshot
from ...laws.zoo import BERT, CONV1DS, EVERY_KIND, GPT2, LINEARS, TIED, Specimen, randomise, run


def delta(model: nn.Module, path: str, name: str = "extracted") -> Tensor:
    factor = dict(layers(model))[path].factor(name)
    return (factor.B.double() @ factor.A.double() * factor.scale).detach()


def tuned_by_rank(specimen: Specimen, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose weights at the targets have changed by something of rank 4."""
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


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS, EVERY_KIND, GPT2], ids=str)
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
    """Sharded files, a first word that the files leave out, modules on the meta device, and a tensor of nobody."""
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
        cut=Cut(rank=4),
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
        ({"tuned": wider}, ModelError, r"up\.weight is \(20, 12\) in the base and \(21, 12\) in the fine-tuned model"),
        ({"tuned": nn.Sequential(nn.Linear(2, 2))}, ModelError, "the fine-tuned model has no (up|square).weight"),
        ({"config": LINEARS.config(use_dora=True)}, ConfigError, "leave use_dora off and bias at 'none'"),
        ({"config": LINEARS.config(bias="all")}, ConfigError, "leave use_dora off"),
        ({"config": LINEARS.config(target_modules=["typo"])}, TargetError, "typo"),
        ({"rank": None}, ConfigError, "Give a rank or a share"),
        ({"name": "x.y"}, AdapterError, "cannot be an adapter's name"),
    )
    for change, error, said in cases:
        given = {"tuned": tuned, "config": LINEARS.config(), "rank": 2, **change}
        with pytest.raises(error, match=said):
            extract(base, given.pop("tuned"), given.pop("config"), **given)
    assert snapshot(base) == before
    with pytest.raises(ModelError, match="there are no safetensors files here"):
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
