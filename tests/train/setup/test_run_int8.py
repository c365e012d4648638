"""Runs whose base is multiplied in int8: record, check of the loss, resuming, and settings that exclude it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.config import LoraConfig
from lorakit.core.model.fingerprint import Fingerprint
from lorakit.durable import sha256_file
from lorakit.errors import LorakitError, RunError, UsageError
from lorakit.train import run
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import run_int8

PROCESSOR = run_int8.unsupported(torch.device("cpu"))
needs_units = pytest.mark.skipif(bool(PROCESSOR), reason=PROCESSOR)


@pytest.fixture
def int8_run(steady_run: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small run with int8 matmuls and without a limit of the loss."""
    return {**steady_run, "base_matmul": "int8", "int8_loss_bound": 10.0, "max_steps": 4, "save_steps": 2}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@needs_units
def test_a_run_records_calibration_and_losses(int8_run: dict[str, Any], tmp_path: Path) -> None:
    result = run(TrainSettings(**int8_run))
    folder = tmp_path / "run"
    record = read(folder / "run.json")
    found = record["int8"]
    assert record["resolved"]["base_matmul"] == "int8" == result.base_matmul
    assert found["layers"] == 14 and found["kept"] == 16 and found["smoothing"] == 0.5
    assert found["rows"] >= 4 and found["tokens"] > 20 and len(found["rows_sha256"]) == 64
    assert found["scales_sha256"] == sha256_file(folder / "int8.safetensors")
    assert found["loss"] > 0 and found["int8_loss"] == pytest.approx(found["loss"], abs=0.05)
    assert found["loss"] != found["int8_loss"]
    assert result.base_bytes == found["bytes_after"] < found["bytes_before"]
    assert "int8" in " ".join(result.lines())
    sidecar = read(folder / "adapter" / "lorakit.json")
    assert sidecar["training"]["base_matmul"] == {"name": "int8", **found}
    assert "int8" in (folder / "adapter" / "README.md").read_text()


@needs_units
def test_the_adapter_has_the_fingerprint_of_the_original_base(int8_run: dict[str, Any], tmp_path: Path) -> None:
    run(TrainSettings(**int8_run))
    base = hub.load_model(int8_run["model"], "float32")
    sidecar = read(tmp_path / "run" / "adapter" / "lorakit.json")
    saved = Fingerprint.from_dict(sidecar["base"])
    assert saved is not None and saved.samples == core.fingerprint(base).samples and not saved.bounds
    assert core.load_adapter(base, tmp_path / "run" / "adapter").warnings == ()
    core.merge(base)


@needs_units
def test_a_resumed_run_has_the_same_bits(int8_run: dict[str, Any], tmp_path: Path) -> None:
    whole = {**int8_run, "output_dir": str(tmp_path / "whole")}
    run(TrainSettings(**whole))
    run(TrainSettings(**{**int8_run, "max_steps": 2}))
    before = read(tmp_path / "run" / "run.json")["int8"]
    run(TrainSettings(**{**int8_run, "resume": True}))
    assert read(tmp_path / "run" / "run.json")["int8"] == before
    first, second = (core.read_for_training(tmp_path / name / "checkpoint-4") for name in ("whole", "run"))
    assert first.weights_sha256 == second.weights_sha256


@needs_units
def test_changed_scales_or_settings_cannot_be_resumed(int8_run: dict[str, Any], tmp_path: Path) -> None:
    run(TrainSettings(**{**int8_run, "max_steps": 2}))
    with pytest.raises(LorakitError, match="base_matmul"):
        run(TrainSettings(**{**int8_run, "resume": True, "base_matmul": "dtype"}))
    path = tmp_path / "run" / "int8.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="SHA-256") as found:
        run(TrainSettings(**{**int8_run, "resume": True}))
    assert found.value.field == "base_matmul"
    path.unlink()
    with pytest.raises(RunError, match=r"int8\.safetensors"):
        run(TrainSettings(**{**int8_run, "resume": True}))


@needs_units
def test_a_loss_above_the_bound_stops_before_the_first_step(
    int8_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(*given: Any) -> tuple[float, ...]:
        return tuple(9.0 for batch in given[1] for _ in batch["input_ids"])

    monkeypatch.setattr(run_int8.core, "base_losses", worse)
    with pytest.raises(RunError, match=r"bound 0\.005.*--int8-loss-bound") as found:
        run(TrainSettings(**{**int8_run, "int8_loss_bound": 0.005}))
    assert found.value.field == "int8_loss_bound"
    assert not (tmp_path / "run").exists()


@needs_units
@pytest.mark.parametrize(
    "fields", [{"init_lora_weights": "pissa"}, {"kasa_config": "{}"}], ids=["an init", "a variant"]
)
def test_what_changes_the_base_is_rejected(int8_run: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="changes the base weights") as found:
        run(TrainSettings(**int8_run, **fields))
    assert found.value.field == "base_matmul" and not (tmp_path / "run").exists()


def test_a_processor_without_int8_units_uses_the_dtype(
    int8_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.session.base_matmul.why_no_int8_matmuls", lambda: "the processor has no int8 units")
    result = run(TrainSettings(**{**int8_run, "max_steps": 2}))
    record = read(tmp_path / "run" / "run.json")
    assert result.base_matmul == "dtype" == record["resolved"]["base_matmul"]
    assert record["int8"] is None and not (tmp_path / "run" / "int8.safetensors").exists()
    said: list[str] = []
    settings, config, device = TrainSettings(**int8_run), LoraConfig(), torch.device("cpu")
    assert run_int8.chosen_matmul(settings, device, None, config, said.append) == "dtype"
    assert "no int8 units" in said[0]
    with pytest.raises(RunError, match="multiplied in int8"):
        run_int8.chosen_matmul(settings, device, {"resolved": {"base_matmul": "int8"}}, config, said.append)


def test_an_accelerator_uses_the_dtype() -> None:
    assert "CPU only" in run_int8.unsupported(torch.device("meta"))


@needs_units
def test_the_adapter_is_also_evaluated_on_the_original_weights(int8_run: dict[str, Any]) -> None:
    result = run(TrainSettings(**int8_run, keep_bf16_base=True))
    plain = run(TrainSettings(**{**int8_run, "overwrite": True}))
    assert result.adapter_loss == plain.adapter_loss
    assert result.original_base_loss == pytest.approx(result.adapter_loss, abs=0.05)
    assert result.original_base_loss != result.adapter_loss
    assert result.base_bytes > plain.base_bytes
    assert any("original weights" in note for note in result.notes)


@pytest.mark.costly(cases=3)
@needs_units
@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_dropout": 0.1, "gradient_accumulation_steps": 2},
        {"recompute": "layers"},
        {"accelerate": False},
        {"init_lora_weights": "eva"},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ],
    ids=["DoRA", "dropout and accumulation", "recomputation", "not accelerated", "EVA", "saved module", "biases"],
)
def test_other_settings_work_with_int8(int8_run: dict[str, Any], fields: dict[str, Any]) -> None:
    result = run(TrainSettings(**int8_run, **fields))
    assert result.base_matmul == "int8" and result.adapter_loss is not None
    assert result.first_loss is not None and result.adapter_loss < result.first_loss


def test_the_calibration_rows_are_the_first_with_enough_tokens() -> None:
    rows: Any = [type("Row", (), {"tokens": 600})() for _ in range(8)]
    assert run_int8.calibration_rows(rows) == rows[:4]
    assert run_int8.calibration_rows(rows[:2]) == rows[:2]


@pytest.mark.slow
@needs_units
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_calibrate_as_one_does(
    int8_run: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    two, parts, alone = (str(tmp_path / name) for name in ("two", "parts", "alone"))
    runs = [
        {**int8_run, "output_dir": two},
        {**int8_run, "output_dir": parts, "max_steps": 2},
        {**int8_run, "output_dir": parts, "resume": True},
        {**int8_run, "output_dir": str(tmp_path / "sharded"), "parallel": "fsdp"},
    ]
    first, second = outcomes(runs)
    assert [one.get("ending") for one in first[:3]] == ["finished"] * 3 == [one.get("ending") for one in second[:3]]
    assert not (tmp_path / "sharded").exists()
    run(TrainSettings(**{**int8_run, "output_dir": alone}))
    records = [read(Path(folder) / "run.json")["int8"] for folder in (two, parts, alone)]
    assert records[0] == records[1]
    assert all(records[0][name] == records[2][name] for name in ("tokens", "rows_sha256", "scales_sha256"))
    bits = [core.read_for_training(Path(folder) / "checkpoint-4").weights_sha256 for folder in (two, parts)]
    assert bits[0] == bits[1]
