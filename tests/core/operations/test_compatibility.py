"""Adapters from files are combined only if they have a common base, task and site, as far as the files tell."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.cli import main
from lorakit.config import CONFIG_FILE
from lorakit.core import combine_folders, save_adapter
from lorakit.core.files.adapter_folder import SIDECAR_FILE
from lorakit.errors import AdapterError, BaseMismatchError, LorakitError

from ...laws.zoo import LLAMA
from .updates import made


def saved(tmp_path: Path, name: str, **fields: Any) -> Path:
    """Save an adapter with random factors; all have the same base."""
    save_adapter(made(LLAMA, name, dtype=torch.float32, **fields), tmp_path / name, name)
    return tmp_path / name


def by_peft(folder: Path, **fields: Any) -> Path:
    """Change a directory to what PEFT writes: a config that names the base, and no `lorakit.json`."""
    (folder / SIDECAR_FILE).unlink()
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, **fields}))
    return folder


def named(tmp_path: Path, **names: str | None) -> list[Path]:
    return [by_peft(saved(tmp_path, label), base_model_name_or_path=name) for label, name in names.items()]


def rejected(tmp_path: Path, folders: list[Path], kind: type[LorakitError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        combine_folders(folders, [1.0] * len(folders), tmp_path / "sum", way="cat")
    assert all(word in str(caught.value) for word in (*words, *(str(folder) for folder in folders)))
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("unknown", [False, True], ids=["two", "with one unknown between"])
def test_names_of_bases_that_differ(unknown: bool, tmp_path: Path) -> None:
    """PEFT's adapters have no fingerprint; only the name of their base is known."""
    folders = named(tmp_path, a="org/llama", c="org/other")
    between = named(tmp_path, b=None) if unknown else []
    given = [folders[0], *between, folders[1]]
    with pytest.raises(BaseMismatchError, match=r"'org/llama'.*'org/other'") as caught:
        combine_folders(given, [1.0] * len(given), tmp_path / "sum", way="cat")
    assert caught.value.override == "base_mismatch"
    assert not (tmp_path / "sum").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combine_folders(given, [1.0] * len(given), tmp_path / "sum", way="cat", allow=["base_mismatch"])


@pytest.mark.parametrize("other", ["org/llama", "/data/models/LLaMA", "/data/llama/"])
def test_one_base_has_several_addresses(other: str, tmp_path: Path) -> None:
    combine_folders(named(tmp_path, a="org/llama", b=other), [1.0, 1.0], tmp_path / "sum", way="cat")


def test_a_base_that_is_not_known_is_reported(tmp_path: Path) -> None:
    folders = named(tmp_path, a="org/llama", b=None)
    with pytest.warns(UserWarning, match="do not show whether both have the same base") as caught:
        combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat")
    assert len(caught) == 1
    assert all(str(folder) in str(caught[0].message) for folder in folders)


def test_fingerprints_that_agree_outweigh_names(tmp_path: Path) -> None:
    folders = [saved(tmp_path, "a"), saved(tmp_path, "b")]
    for folder, name in zip(folders, ("org/llama", "org/renamed"), strict=True):
        values = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**values, "base_model_name_or_path": name}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*edited after")
        combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat")


def test_tasks_that_differ(tmp_path: Path) -> None:
    folders = [saved(tmp_path, "a", task_type="CAUSAL_LM"), saved(tmp_path, "b", task_type="SEQ_CLS")]
    rejected(tmp_path, folders, BaseMismatchError, "CAUSAL_LM", "SEQ_CLS", "task_type", "'base_mismatch'")
    combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat", allow=["base_mismatch"])


def test_a_task_that_is_not_known_differs_from_none(tmp_path: Path) -> None:
    folders = [saved(tmp_path, "a", task_type="CAUSAL_LM"), saved(tmp_path, "b"), saved(tmp_path, "c")]
    combine_folders(folders, [1.0] * 3, tmp_path / "sum", way="cat")


def test_adapters_without_a_common_site(tmp_path: Path) -> None:
    folders = [
        by_peft(saved(tmp_path, name, target_modules=[target]), base_model_name_or_path="org/llama")
        for name, target in (("a", "q_proj"), ("b", "v_proj"))
    ]
    with pytest.raises(AdapterError, match="no sites in common") as caught:
        combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat")
    assert caught.value.override == "key_mismatch" and "q_proj" in str(caught.value.where)
    assert not (tmp_path / "sum").exists()
    report = combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat", allow=["key_mismatch"])
    assert {site.path.rpartition(".")[2] for site in report.sites} == {"q_proj", "v_proj"}


def test_adapters_of_one_proven_base_need_no_common_site(tmp_path: Path) -> None:
    """One adapts the attention, the other the feed-forward part: their combined effect is well defined."""
    folders = [saved(tmp_path, "a", target_modules=["q_proj"]), saved(tmp_path, "b", target_modules=["v_proj"])]
    report = combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat")
    assert {site.path.rpartition(".")[2] for site in report.sites} == {"q_proj", "v_proj"}


def test_one_stranger_among_several_is_named(tmp_path: Path) -> None:
    folders = [saved(tmp_path, name, target_modules=["v_proj", "down_proj"]) for name in "bc"]
    folders.append(saved(tmp_path, "a", target_modules=["q_proj"]))
    for folder in folders:
        by_peft(folder, base_model_name_or_path="org/llama")
    with pytest.raises(AdapterError, match=r"/a has no sites in common"):
        combine_folders(folders, [1.0] * 3, tmp_path / "sum", way="cat")


def test_sites_in_part_in_common_are_united(tmp_path: Path) -> None:
    folders = [
        saved(tmp_path, "a", target_modules=["q_proj", "v_proj"]),
        saved(tmp_path, "b", target_modules=["v_proj", "down_proj"]),
    ]
    report = combine_folders(folders, [1.0, 1.0], tmp_path / "sum", way="cat")
    assert {site.path.rpartition(".")[2] for site in report.sites} == {"q_proj", "v_proj", "down_proj"}


def test_an_adapter_alone_has_nothing_to_share(tmp_path: Path) -> None:
    combine_folders([saved(tmp_path, "a")], [0.5], tmp_path / "half", way="cat")


def test_the_command_names_its_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [saved(tmp_path, "a", target_modules=["q_proj"]), saved(tmp_path, "b", target_modules=["v_proj"])]
    words = ["combine", "--adapter", *map(str, folders), "--output-dir", str(tmp_path / "sum"), "--way", "cat"]
    by_peft(folders[0], base_model_name_or_path="org/one")
    by_peft(folders[1], base_model_name_or_path="org/one")
    assert main(words) == 1
    assert "--allow-key-mismatch" in capsys.readouterr().err
    assert main([*words, "--allow-key-mismatch"]) == 0
    config = json.loads((folders[1] / CONFIG_FILE).read_text())
    (folders[1] / CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": "org/two"}))
    assert main([*words[:-3], str(tmp_path / "other"), "--way", "cat"]) == 1
    assert "--allow-base-mismatch" in capsys.readouterr().err
