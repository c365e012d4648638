"""Adapters on disk are combined without their base, into directories that every reader can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core import (
    attach,
    combine_folders,
    load_adapter,
    save_adapter,
    use,
)
from lorakit.errors import (
    AdapterError,
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    UsageError,
)

from ...laws.snapshots import files
from ...laws.zoo import (
    EMBEDDING,
    GPT2,
    LINEARS,
    LLAMA,
    Specimen,
    randomise,
    run,
)
from .updates import deltas, made, same, total

# --- directories


def saved(tmp_path: Path, *names: str, specimen: Specimen = LLAMA, **fields: Any) -> nn.Module:
    model = made(specimen, *names, dtype=torch.float32, **fields)
    for name in names:
        save_adapter(model, tmp_path / name, name, facts={"base_name": "tiny", "training": {"step": 3}})
    return model


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, EMBEDDING], ids=str)
def test_folders_are_combined_without_their_base(tmp_path: Path, specimen: Specimen) -> None:
    model = saved(tmp_path, "a", "b", specimen=specimen)
    report = combine_folders([tmp_path / "a", tmp_path / "b"], [0.5, -1.0], tmp_path / "sum", way="cat")
    loaded = load_adapter(model, tmp_path / "sum", "sum")
    same(deltas(model, "sum"), total(model, {"a": 0.5, "b": -1.0}), 1e-5)
    assert (loaded.base, loaded.warnings) == ("same", ())
    about = json.loads((tmp_path / "sum" / "lorakit.json").read_text())
    assert about["operation"] == report.facts["operation"]
    assert about["operation"]["name"] == "combine" and about["operation"]["way"] == "cat"
    assert [(of["name"], of["weight"], len(of["sha256"])) for of in about["operation"]["of"]] == [
        ("a", 0.5, 64),
        ("b", -1.0, 64),
    ]
    assert about["base_name"] == "tiny" and "training" not in about
    assert str(tmp_path) not in (tmp_path / "sum" / "lorakit.json").read_text()


def test_ranks_of_the_result_are_read_by_any_reader(tmp_path: Path) -> None:
    """The config alone gives each site its rank and scale 1: without lorakit.json, and with overlapping patterns."""
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(6, 6))
    inner = nn.Sequential()
    inner.add_module("lin", nn.Linear(6, 6))
    model.add_module("deep", inner)
    from lorakit.config import LoraConfig

    for name, pattern in (("a", {"^lin": 3}), ("b", {"deep.lin": 2})):
        attach(
            model, LoraConfig(r=4, lora_alpha=9, rank_pattern=pattern, target_modules=["lin"], use_rslora=True), name
        )
        randomise(model, name, len(pattern))
        save_adapter(model, tmp_path / name, name)
    report = combine_folders([tmp_path / "a", tmp_path / "b"], [1.0, 1.0], tmp_path / "sum", way="cat")
    assert sorted(site.r for site in report.sites) == [6, 7]
    (tmp_path / "sum" / "lorakit.json").unlink()
    load_adapter(model, tmp_path / "sum", "sum")
    same(deltas(model, "sum"), total(model, {"a": 1.0, "b": 1.0}), 1e-5)


def test_dora_folders_need_the_base(tmp_path: Path) -> None:
    model = saved(tmp_path, "a", "c", specimen=LINEARS, use_dora=True)
    folders = [tmp_path / "a", tmp_path / "c"]
    with pytest.raises(AdapterError, match=r"a uses DoRA, whose effect depends on the base weights"):
        combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat")
    assert not (tmp_path / "sum").exists()
    combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat", model=LINEARS.model())
    load_adapter(model, tmp_path / "sum", "sum")
    with use(model, "a", "c"):
        both = run(model, LINEARS.given())
    with use(model, "sum"):
        torch.testing.assert_close(run(model, LINEARS.given()), both, rtol=1e-4, atol=1e-4)


def test_adapters_of_other_bases_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "a")
    other = LLAMA.model(seed=5)
    attach(other, LLAMA.config(), "x")
    save_adapter(other, tmp_path / "x", "x")
    folders = [tmp_path / "a", tmp_path / "x"]
    with pytest.raises(BaseMismatchError, match="different bases"):
        combine_folders(folders, [1.0, 1.0], tmp_path / "sum")
    combine_folders(folders, [1.0, 1.0], tmp_path / "sum", allow=("base_mismatch",))
    saved(tmp_path / "gpt2", "a", specimen=GPT2)
    with pytest.raises(BaseMismatchError, match="different bases"):
        combine_folders([tmp_path / "a", tmp_path / "gpt2" / "a"], [1.0, 1.0], tmp_path / "y")


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    saved(tmp_path, "a", specimen=LINEARS)
    other = nn.Sequential()
    other.add_module("up", nn.Linear(5, 20))
    from lorakit.config import LoraConfig

    attach(other, LoraConfig(target_modules=["up"]), "x")
    save_adapter(other, tmp_path / "x", "x")
    with pytest.raises(AdapterError, match=r"at up, they change weights of different shapes: 20 × 12 and 20 × "):
        combine_folders([tmp_path / "a", tmp_path / "x"], [1, 1], tmp_path / "sum", allow=("base_mismatch",))


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    saved(tmp_path, "a", "b")
    before = files(tmp_path)
    with pytest.raises(UsageError, match="not an empty directory"):
        combine_folders([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "a")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        combine_folders([tmp_path / "a"], [1e300], tmp_path / "c")
    with pytest.raises(AdapterFileError, match="directory not found"):
        combine_folders([tmp_path / "a", tmp_path / "typo"], [1, 1], tmp_path / "c")
    with pytest.raises(ConfigError, match="allow contains 'all'"):
        combine_folders([tmp_path / "a"], [1], tmp_path / "c", allow=("all",))
    assert files(tmp_path) == before


def test_a_site_inside_what_another_copied_is_refused(tmp_path: Path) -> None:
    for name, fields in (("a", {"modules_to_save": ["out"]}), ("b", {"target_modules": ["up", "out"]})):
        model = LINEARS.model()
        attach(model, LINEARS.config(**fields), name)
        save_adapter(model, tmp_path / name, name)
    with pytest.raises(AdapterError, match=r"b adapts out, .*modules_to_save"):
        combine_folders([tmp_path / "a", tmp_path / "b"], [1.0, 1.0], tmp_path / "sum")
