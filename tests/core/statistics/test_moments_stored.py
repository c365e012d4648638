"""Statistics in a file: saved and loaded, and rejected if damaged or collected for another base or init."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.config.nested import CordaConfig, EvaConfig, LoraGAConfig
from lorakit.core import Statistics, attach, collect_for, disable, load_statistics, sites
from lorakit.core.operations.data_init import DataSites
from lorakit.core.statistics.moments import KEY
from lorakit.errors import AdapterFileError, BaseMismatchError, ConfigError, DataError, TargetError

from ...laws.snapshots import same_bits, snapshot
from ...laws.zoo import CONV2, LINEARS, randomise, run

SETTINGS: dict[str, dict[str, Any]] = {
    "eva": {"eva_config": EvaConfig(rho=2.0, whiten=True), "rank_pattern": {"square": 3}},
    "corda": {"corda_config": CordaConfig(corda_method="kpm"), "alpha_pattern": {"up": 3.5}},
    "lora_ga": {"lora_ga_config": LoraGAConfig(direction="ArBr"), "use_rslora": True},
}
EVERY = pytest.mark.parametrize("init", list(SETTINGS))


def config_for(init: str, **fields: Any) -> LoraConfig:
    return LINEARS.config(init_lora_weights=init, **{**SETTINGS[init], **fields})


def forward(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y.square().mean()


BATCHES = [torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def collected(init: str, **fields: Any) -> Statistics:
    return collect_for(LINEARS.model(), config_for(init, **fields), BATCHES, forward)


def same(one: Statistics, other: Statistics) -> bool:
    assert {site: set(named) for site, named in one.sites.items()} == {s: set(n) for s, n in other.sites.items()}
    return all(same_bits(t, other.sites[site][name]) for site, named in one.sites.items() for name, t in named.items())


@EVERY
def test_what_is_loaded_is_what_was_saved_and_attaches_alike(init: str, tmp_path: Path) -> None:
    found = collected(init)
    if init == "lora_ga":
        found = dataclasses.replace(found, others_usual=True)
    found.save(tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")
    assert same(found, again) and again.base == found.base is not None
    assert again.others_usual == found.others_usual and again.size_bytes == found.size_bytes > 0
    assert again.config.as_json() == found.config.as_json() and type(again.config) is LoraConfig
    models = []
    for statistics in (found, again):
        models.append(LINEARS.model())
        attach(models[-1], statistics.config, seed=1, statistics=statistics)
    for one, other in zip(sites(models[0]), sites(models[1]), strict=True):
        for part in ("A", "B"):
            first, second = (getattr(site.layer.factor("default"), part) for site in (one, other))
            assert same_bits(first, second)
        assert same_bits(one.layer.owner.weight, other.layer.owner.weight)
    first_bytes = (tmp_path / "s.safetensors").read_bytes()
    again.save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == first_bytes


def test_a_file_keeps_another_dtype_and_names_with_slashes(tmp_path: Path) -> None:
    numbers = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    found = Statistics(config_for("eva"), {"a/b": {"x": numbers}})
    found.save(tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")
    assert same_bits(again.sites["a/b"]["x"], numbers) and again.base is None and not again.others_usual


def test_what_is_no_whole_file_of_statistics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    found = collected("eva")
    found.save(path)
    whole = path.read_bytes()
    tensors, words = load(whole), header(whole)  # in memory, because the file is rewritten

    def refused(text: str, content: bytes | None = None) -> None:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(AdapterFileError, match=text):
            load_statistics(path)

    refused("truncated or damaged", whole[:-4])
    refused("too few for a safetensors file", b"")
    refused(
        "the file is damaged: its tensors do not match their checksum", whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    )
    refused("not a safetensors file .*a pickle, which is never loaded", pickle.dumps({"up/U": 1}))
    torch.save(tensors, path)
    refused("not a safetensors file .*a pickle, which is never loaded")
    save_file(tensors, path)
    refused("not written by `Statistics.save`. Collect the statistics again")
    for change, text in (
        ({KEY: "2"}, "its format is '2', not '1'. Update lorakit"),
        ({"facts": "{"}, "its header cannot be read"),
        ({"facts": json.dumps({"config": {"r": -1}})}, "its header cannot be read"),
        ({"facts": json.dumps({**json.loads(words["facts"]), "base": {"x": 1}})}, "is not a fingerprint"),
    ):
        save_file(tensors, path, {**words, **change})
        refused(text)
    sick = {**found.sites, "up": {**found.sites["up"], "values": found.sites["up"]["values"] * torch.nan}}
    dataclasses.replace(found, sites=sick).save(path)
    refused("up/values contains NaN or infinite values")
    path.unlink()
    refused("no such file")


def header(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    words: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return words


@EVERY
def test_another_base_other_sites_and_another_config_are_refused_and_nothing_changes(init: str) -> None:
    found = collected(init)

    def refused(error: type[Exception], text: str, model: nn.Module, config: LoraConfig = found.config) -> None:
        before = snapshot(model)
        with pytest.raises(error, match=text):
            attach(model, config, statistics=found)
        assert snapshot(model) == before

    other = LINEARS.model(seed=99)
    refused(BaseMismatchError, "collected on a different base: values in .* differ.*Collect them again", other)
    narrow = nn.Sequential(OrderedDict(up=nn.Linear(12, 20), square=nn.Linear(20, 20)))
    refused(BaseMismatchError, "different base: names or shapes of the base's parameters differ", narrow)
    word = nn.Sequential(nn.Linear(2, 2)).append(nn.Embedding(3, 2))
    refused(BaseMismatchError, "collected on a different base", word)
    more = found.config.with_fields(target_modules=["up", "square", "out"])
    refused(ConfigError, "out: .*nothing was collected for this site", LINEARS.model(), more)
    usual = found.config.with_fields(init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None)
    refused(
        ConfigError,
        rf"for init_lora_weights='{init}', but the config has True.*collect them again",
        LINEARS.model(),
        usual,
    )
    if init == "corda":
        ipm = found.config.with_fields(corda_config=CordaConfig(corda_method="ipm"))
        refused(ConfigError, "for corda_method='kpm', but the config has 'ipm'", LINEARS.model(), ipm)
    larger = found.config.with_fields(r=9, rank_pattern={})
    refused(ConfigError, "collected for rank .*but r is 9|the maximum at this site is ", LINEARS.model(), larger)
    fewer = found.config.with_fields(target_modules=["up"], rank_pattern={}, alpha_pattern={})
    model = LINEARS.model()
    assert [m.path for m in attach(model, fewer, statistics=found).matches] == ["up"]
    half = LINEARS.model(torch.bfloat16)  # the same base at another precision
    attach(half, found.config, statistics=found)


def test_the_base_is_the_one_under_adapters_and_merges() -> None:
    model = LINEARS.model()
    attach(model, LINEARS.config(init_lora_weights="pissa"), "moved")
    randomise(model, "moved", 4)
    with disable(model):
        expected = run(model, BATCHES[0])
    found = collect_for(model, config_for("eva"), BATCHES, forward)
    assert found.base == collected("eva").base and same(found, collected("eva"))
    attach(model, found.config, "second", statistics=found)
    with disable(model):
        assert same_bits(run(model, BATCHES[0]), expected)


def test_what_cannot_be_collected_is_said() -> None:
    def refused(error: type[Exception], text: str, config: LoraConfig, batches: Any = BATCHES, **more: Any) -> None:
        model = more.pop("model", None) or LINEARS.model()
        before = snapshot(model)
        with pytest.raises(error, match=text):
            collect_for(model, config, batches, more.pop("forward", forward), **more)
        assert snapshot(model) == before

    refused(ConfigError, "is True, which uses no data", LINEARS.config())
    refused(ConfigError, "is 'pissa', which uses no data", LINEARS.config(init_lora_weights="pissa"))
    refused(ConfigError, "layer_replication adds layers", config_for("eva", layer_replication=[(0, 1)]))
    refused(TargetError, "nowhere", config_for("eva", target_modules=["nowhere"]))
    refused(TargetError, "nowhere", config_for("eva", target_modules=["up", "nowhere"]))
    refused(DataError, "`batches` is empty", config_for("eva"), [])
    refused(
        DataError,
        r"mask of shape \(3, 5\) does not match the input of up",
        config_for("eva"),
        keep=lambda batch: torch.ones(3, 5),
    )
    refused(DataError, "square: No batch reached this site", config_for("eva"), forward=lambda m, x: m.up(x).sum())
    refused(
        DataError, "square: No loss depended on this site", config_for("lora_ga"), forward=lambda m, x: m.up(x).sum()
    )
    refused(
        ConfigError, "Invalid corda_method found: x", config_for("corda", corda_config=CordaConfig(corda_method="x"))
    )
    refused(
        ConfigError,
        "direction is 'x'; it must be one of",
        config_for("lora_ga", lora_ga_config=LoraGAConfig(direction="x")),
    )
    refused(ConfigError, "r is 13, but the maximum at this site is 12", config_for("eva", r=13, rank_pattern={}))
    embed = nn.Sequential(OrderedDict(up=nn.Embedding(9, 12)))
    refused(
        ConfigError,
        "up: Embedding does not support init_lora_weights='eva'",
        config_for("eva", target_modules=["up"], rank_pattern={}),
        model=embed,
    )
    grouped = nn.Sequential(OrderedDict(up=nn.Conv1d(4, 6, 1, groups=2)))
    refused(TargetError, "up.*groups", config_for("eva", target_modules=["up"], r=2, rank_pattern={}), model=grouped)


def test_data_that_is_gone_through_once_is_refused_where_twice_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import lorakit.core.operations.data_init as module

    monkeypatch.setattr(module, "in_groups", lambda paths, _: [[path] for path in paths])
    with pytest.raises(DataError, match="2 times to limit memory use; pass a list"):
        collect_for(LINEARS.model(), config_for("eva"), iter(BATCHES), forward)
    assert same(collected("eva"), collect_for(LINEARS.model(), config_for("eva"), BATCHES, forward))


def test_what_was_collected_elsewhere_is_reduced_to_the_same() -> None:
    from lorakit.core.statistics.collecting import collect_inputs

    model, config = LINEARS.model(), config_for("eva", eva_config=EvaConfig(rho=1.0))
    inputs = collect_inputs(model, ["up"], BATCHES, forward)
    found = DataSites.of(model, config).reduce(model, inputs)
    assert list(found.sites) == ["up"] and found.base == collected("eva").base
    whole = collect_for(model, config, BATCHES, forward)
    assert same_bits(found.sites["up"]["directions"], whole.sites["up"]["directions"])


def test_convolutions_too(tmp_path: Path) -> None:
    config = CONV2.config(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    found = collect_for(CONV2.model(), config, [CONV2.given(rows=8)], forward)
    found.save(tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")
    attach(CONV2.model(), again.config, statistics=again)
    assert same(found, again)
