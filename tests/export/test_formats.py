"""What `lorakit export` writes: names after the content, immutable directories, and nothing after an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.operations.tensor_sources import weights_of_folder
from lorakit.errors import AdapterError, UsageError
from lorakit.export.conditions import VLLM_RANKS
from lorakit.export.formats import FORMATS, export
from lorakit.export.peft_folder import serving_commands
from lorakit.export.request import Exported, ExportRequest
from lorakit.registry import name_of


def saved(folder: Path, seed: int = 0, **settings: object) -> Path:
    """Save an adapter with random factors for a small model."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    core.attach(model, LoraConfig(**{"r": 2, "target_modules": ["0", "1"], **settings}))
    with torch.no_grad():
        for _, parameter in core.trainable_parameters(model):
            parameter.normal_()
    core.save_adapter(model, folder, base_model_name_or_path="owner/base")
    return folder


def exported(folder: Path, output: Path, **fields: object) -> tuple[Exported, Path]:
    return export("vllm", ExportRequest(core.common_form(folder), "notes", **fields), output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_name_is_that_of_the_content(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", seed=1)
    first, folder = exported(one, tmp_path / "out")
    assert folder == tmp_path / "out" / first.name
    before = contents(folder)
    again, _ = exported(one, tmp_path / "again")
    assert again == first
    assert contents(tmp_path / "again" / first.name) == before  # byte for byte
    names = {first.name, exported(other, tmp_path / "out")[0].name}
    names.add(exported(one, tmp_path / "out", served_base="/models/base")[0].name)
    (one / "chat_template.jinja").write_text("{{ messages }}")
    names.add(exported(one, tmp_path / "out")[0].name)
    assert len(names) == 4
    assert contents(folder) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


def test_an_export_is_never_changed(tmp_path: Path) -> None:
    source = saved(tmp_path / "one")
    folder = exported(source, tmp_path / "out")[1]
    exported(source, tmp_path / "out")  # already there
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        exported(source, tmp_path / "out")
    assert caught.value.where == str(folder)
    assert (folder / "adapter_config.json").read_text() == "{}"


def test_the_served_base_is_in_the_config(tmp_path: Path) -> None:
    folder = exported(saved(tmp_path / "one"), tmp_path / "out", served_base="/models/My Base")[1]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "/models/My Base"
    assert weights_of_folder(folder).config.lora_alpha == 2


@pytest.mark.parametrize("targets", [["0", "1"], r"(0|1)", "all-linear"])
def test_targets_are_a_list_that_sglang_reads(tmp_path: Path, targets: object) -> None:
    folder = exported(saved(tmp_path / "one", target_modules=targets), tmp_path / "out")[1]
    found = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(found, list)
    assert {name.split(".")[-1] for name in found} == {"0", "1"}  # get_normalized_target_modules of SGLang 0.5.23


def test_errors_leave_nothing(tmp_path: Path) -> None:
    waiting = saved(tmp_path / "one", alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    with pytest.raises(AdapterError):
        exported(waiting, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vllm_gets_a_rank_that_it_accepts() -> None:
    for rank in range(1, 513):
        command = serving_commands("n@0", "base", rank, "OUTPUT")["vLLM"].split()
        limit = int(command[command.index("--max-lora-rank") + 1])
        assert limit >= rank and limit in VLLM_RANKS
        assert all(smaller < rank for smaller in VLLM_RANKS[1:] if smaller < limit)
    assert "vLLM" not in serving_commands("n@0", "base", 513, "OUTPUT")


@pytest.mark.parametrize(
    ("folder", "name"),
    [("runs/notes/adapter", "notes"), ("legal v2", "legal-v2"), ("_x", "x"), ("법률", "adapter"), ("x" * 80, "x" * 64)],
)
def test_adapters_are_named_after_their_run(tmp_path: Path, folder: str, name: str) -> None:
    assert name_of(tmp_path / folder) == name


def test_formats_are_those_of_the_command() -> None:
    from typing import get_args

    from lorakit.choices import ExportFormatName

    assert {name.partition(" ")[0] for name in FORMATS} == set(get_args(ExportFormatName))
