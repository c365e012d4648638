"""Adapters, a merged model and a run of November 2026 load, act and continue as they did then."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit.peft
from lorakit import core
from lorakit.errors import AdapterFileError, BaseMismatchError

from .format_1 import ADAPTERS, BASES, GOLDEN, HERE, MERGED, RUN, base_of, output_of, own_kinds


def _expected(folder: Path) -> tuple[str, Tensor]:
    facts = json.loads((folder / "expected.json").read_text())
    return facts["base"], torch.tensor(facts["outputs"])


def _allowed(name: str) -> tuple[str, ...]:
    return ("recompute_init",) if name == "loftq" else ()  # a quantized residual has no plain form


def _close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


def test_every_folder_has_its_line() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir()) == sorted(GOLDEN)
    assert {golden.base for golden in GOLDEN.values()} == set(BASES)
    for name in GOLDEN:
        assert json.loads((ADAPTERS / name / "lorakit.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_an_adapter_gives_the_outputs_of_its_writer(name: str) -> None:
    base, wanted = _expected(ADAPTERS / name)
    model, kinds = base_of(base), own_kinds() if base == "own" else ()
    assert float((output_of(model, base) - wanted).abs().max()) > 1e-3
    report = core.load_adapter(model, ADAPTERS / name, kinds=kinds, allow=_allowed(name))
    assert (report.base, report.warnings) == ("same", ())
    _close(output_of(model, base), wanted)


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"own-kind", "alora"}))  # no such kinds; no causal model
def test_it_does_through_the_api_of_peft(name: str) -> None:
    base, wanted = _expected(ADAPTERS / name)
    model = lorakit.peft.PeftModel.from_pretrained(base_of(base), ADAPTERS / name)
    _close(output_of(model, base), wanted)


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"own-kind"}))
def test_it_loads_to_be_trained_and_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    base, wanted = _expected(ADAPTERS / name)
    model = base_of(base)
    core.load_adapter(model, ADAPTERS / name, trainable=True, allow=_allowed(name))
    assert list(core.trainable_parameters(model, "default"))
    _close(output_of(model, base), wanted)
    core.save_adapter(model, tmp_path / "again")
    again = base_of(base)
    assert core.load_adapter(again, tmp_path / "again", allow=_allowed(name)).warnings == ()
    _close(output_of(again, base), wanted)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_it_can_be_inspected(name: str) -> None:
    summary = core.inspect_adapter(ADAPTERS / name)
    assert summary.config.r in (2, 4)  # 4: the plain LoRA of an init that modifies the base weights


def test_a_byte_of_the_weights_is_still_verified(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ADAPTERS / "linear-plain", tmp_path / "changed"))
    weights = bytearray((folder / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(AdapterFileError, match="SHA-256"):
        core.load_adapter(base_of("dense"), folder)


def test_the_merged_model_gives_the_outputs_and_rejects_the_adapter() -> None:
    from lorakit import hub

    base, wanted = _expected(MERGED)
    model = hub.load_model(MERGED / "model", dtype="float32")
    torch.testing.assert_close(output_of(model, base), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(BaseMismatchError, match="merged"):
        core.load_adapter(model, ADAPTERS / "llama-all-linear")


def test_the_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.cli import main

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = Path(shutil.copytree(RUN, tmp_path / "moved"))
    monkeypatch.chdir(folder)
    rows = _rows(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    assert not main(["train", "--output-dir", "run", "--resume"])
    assert [path.name for path in sorted((folder / "run").glob("checkpoint-*"))][-1] == "checkpoint-8"
    after = _rows(folder)
    assert after[: len(rows)] == rows
    assert [row["step"] for row in after if "loss" in row] == list(range(1, 9))
    assert json.loads((folder / "run/run.json").read_text())["status"] == "finished"
    model = base_of("llama")
    assert core.load_adapter(model, folder / "run/adapter").base == "same"


def test_an_older_checkpoint_stands_in_for_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.cli import main

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = Path(shutil.copytree(RUN, tmp_path / "moved"))
    monkeypatch.chdir(folder)
    (folder / "run/checkpoint-5/optimizer.safetensors").write_bytes(b"damaged")
    assert not main(["train", "--output-dir", "run", "--resume"])
    assert json.loads((folder / "run/run.json").read_text())["status"] == "finished"
    assert (folder / "run/damaged-checkpoint-5").is_dir()


def test_the_checkpoint_is_an_adapter() -> None:
    model = base_of("llama")
    report = core.load_adapter(model, RUN / "run/checkpoint-5")
    assert (report.base, report.sites) == ("same", 14)
    assert float((output_of(model, "llama") - output_of(base_of("llama"), "llama")).abs().max()) > 0


def test_the_run_is_read_for_its_report() -> None:
    from lorakit.report import read_metrics
    from lorakit.train.files.run_folder import read_record

    record = read_record(RUN / "run")
    assert record is not None
    assert record["status"] == "interrupted"
    assert [row["step"] for row in read_metrics(RUN / "run").train] == [1, 2, 3, 4, 5]


def test_the_files_name_no_machine_and_are_small() -> None:
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    assert not [path for path in files if b"/work" in path.read_bytes() or b"/home" in path.read_bytes()]


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
