"""docs/format.md lists the fields that the code writes, no more and no fewer."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, durable_folders, tensor_headers
from lorakit.config import LoraConfig
from lorakit.config.variants import VARIANT_COSTS, VariantCosts
from lorakit.core.files import adapter_folder
from lorakit.core.variants import OwnTensor, own_tensors
from lorakit.hub.packaged import MANIFEST
from lorakit.registry import NameEntry
from lorakit.tensor_headers import ENDINGS
from lorakit.train.files import checkpoint
from lorakit.train.files import checkpoint as state
from lorakit.train.files.train_state import TrainState

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def listed(name: str) -> list[str]:
    """The words in backticks of the paragraph, or the first column of the table, after a marker."""
    block = PAGE.split(f"<!-- fields: {name} -->\n\n")[1].split("\n\n")[0]
    if block.startswith("|"):
        return re.findall(r"^\| `([\w.]+)`", block, re.MULTILINE)
    return re.findall(r"`(\w+)`", block)


def test_fields_of_lorakit_json(tiny_llama: Any, tmp_path: Path) -> None:
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"]))
    core.save_adapter(tiny_llama, tmp_path)
    about = json.loads((tmp_path / "lorakit.json").read_text(encoding="utf-8"))
    found = [
        f"{key}.{inner}" if key in ("weights", "config", "base") else key
        for key, value in about.items()
        for inner in (value if key in ("weights", "config", "base") else [""])
    ]
    assert sorted(listed("sidecar")) == sorted(found)
    assert set(next(iter(about["sites"].values()))) == {"r", "lora_alpha"}
    assert {path.name for path in tmp_path.iterdir()} == set(re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)[:3])


def test_rows_state_and_environment() -> None:
    assert listed("train")[0] == listed("eval")[0] == "step"  # tests/cli/test_train.py compares the rows of a run
    assert listed("state") == [field.name for field in dataclasses.fields(TrainState)]
    assert listed("environment") == list(state.environment(torch.device("cpu"), "float32"))


def test_fields_of_a_name_in_a_registry() -> None:
    values = NameEntry.first("legal", "a" * 64).as_json()
    assert sorted(listed("name")) == sorted(values)
    assert all(f"`{key}`" in PAGE for key in values["history"][0])


def test_names_and_caps() -> None:
    names = (checkpoint.MANIFEST, checkpoint.STATE, checkpoint.OPTIMIZER, checkpoint.RANDOM, MANIFEST)
    assert all(f"`{name}`" in PAGE for name in names)
    assert all(f"`{ending}`" in PAGE for ending in ENDINGS if not ending.endswith("vector.weight"))
    assert tensor_headers.MAX_FILE_BYTES == 64 << 30
    assert tensor_headers.MAX_HEADER_BYTES == 8 << 20
    assert tensor_headers.MAX_TENSORS == 100_000
    assert durable_folders.MOST_ENTRIES == 10_000
    assert adapter_folder.MAX_BYTES == 16 << 20
    assert adapter_folder.FORMAT_VERSION == 2


@pytest.mark.parametrize("tensor", list(own_tensors()), ids=lambda tensor: tensor.held_as)
def test_each_variants_tensor_is_listed(tensor: OwnTensor) -> None:
    assert f"`.{tensor.held_as}`" in PAGE


@pytest.mark.parametrize("costs", VARIANT_COSTS, ids=lambda costs: costs.field)
def test_each_type_that_peft_lacks_is_listed(costs: VariantCosts) -> None:
    assert f'`"{costs.peft_type or "LORA"}"`' in PAGE
