"""Adapters that peft made under transformers 4, where each expert was a module, give the same logits under transformers 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorakit.peft as ours
from lorakit import core

from ..loading import load

FOLDERS = sorted(Path(__file__).with_name("transformers-4").iterdir())
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def base_of(folder: Path) -> Any:
    """Return the model of a directory, which transformers 4 wrote."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()


def logits_of(model: Any, folder: Path) -> Tensor:
    """Return the logits of a model for the input in a directory."""
    with torch.no_grad():
        found: Tensor = model(input_ids=load_file(folder / "expected.safetensors")["input_ids"], use_cache=False).logits
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_are_those_of_transformers_4(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")["logits"]
    model = base_of(folder)
    assert float((logits_of(model, folder) - expected).abs().max()) > 1e-2
    report = core.load_adapter(model, folder)
    assert report.sites == len(core.sites(model))
    torch.testing.assert_close(logits_of(model, folder), expected, **CLOSE)
    wrapped = ours.PeftModel.from_pretrained(base_of(folder), folder)
    torch.testing.assert_close(logits_of(wrapped, folder), expected, **CLOSE)
    core.save_adapter(model, tmp_path)
    again = base_of(folder)
    core.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits_of(again, folder), expected, **CLOSE)
    core.merge_and_unload(model, "default")
    torch.testing.assert_close(logits_of(model, folder), expected, rtol=1e-4, atol=1e-4)


READ_BY_PEFT = [folder for folder in FOLDERS if folder.name != "deepseek-v3"]  # peft drops dense modules of these names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", READ_BY_PEFT, ids=lambda folder: folder.name)
def test_peft_reads_what_lorakit_saves_again(folder: Path, tmp_path: Path) -> None:
    theirs = pytest.importorskip("peft")
    model = base_of(folder)
    core.load_adapter(model, folder)
    core.save_adapter(model, tmp_path)
    read = theirs.PeftModel.from_pretrained(base_of(folder), tmp_path).eval()
    torch.testing.assert_close(logits_of(read, folder), load_file(folder / "expected.safetensors")["logits"], **CLOSE)


def test_the_directories_are_those_of_the_script_and_small() -> None:
    script = load("scripts/old_experts.py")
    assert [folder.name for folder in FOLDERS] == sorted(script.FAMILIES)
    files = [path for folder in FOLDERS for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
