"""Whole runs on a base in fp16: precision of the factors, resuming, skipped steps, and what is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import ConfigError, NonFiniteError
from lorakit.report import read_metrics
from lorakit.train.files import checkpoint
from lorakit.train.loop import loop, optimizer
from lorakit.train.progress import PlainProgress
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import prepare, run_plan
from lorakit.train.trainer import run

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    return {**short_run, "dtype": "float16", "max_steps": 6, "eval_fraction": 0.2, "eval_steps": 3, "save_steps": 2}


def _run(settings: dict[str, Any], **more: Any) -> Any:
    return run(TrainSettings(**{**settings, **more}), PlainProgress(verbose=True))


def _scaled(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Let new runs begin with a loss scale at which gradients overflow for some steps."""
    real = optimizer.loss_scaler

    def loss_scaler(device: torch.device, dtype: str, state: Any = None) -> Any:
        made = real(device, dtype, state)
        if made is not None and not state:
            made.load_state_dict({**made.state_dict(), "scale": scale})
        return made

    monkeypatch.setattr(prepare, "loss_scaler", loss_scaler)


def test_a_run_in_fp16_learns_what_the_run_in_fp32_learns(settings: dict[str, Any], tmp_path: Path) -> None:
    result = _run(settings)
    whole = _run(settings, dtype="float32", output_dir=tmp_path / "whole")
    assert result.dtype == "float16" and result.first_loss == pytest.approx(whole.first_loss, rel=1e-3)
    ours, wanted = (
        [row["loss"] for row in read_metrics(folder).train] for folder in (tmp_path / "run", tmp_path / "whole")
    )
    assert ours == pytest.approx(wanted, rel=2e-3) and ours[-1] < ours[0]
    tensors = load_file(tmp_path / "run" / ADAPTER)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    moments = load_file(tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors")
    assert {tensor.dtype for name, tensor in moments.items() if name.startswith("exp_avg")} == {torch.float32}
    rows = read_metrics(tmp_path / "run").train
    assert all(row["loss_scale"] >= 1 and row["skipped_steps"] >= 0 for row in rows)
    assert not {"loss_scale", "skipped_steps"} & read_metrics(tmp_path / "whole").train[0].keys()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["resolved"]["dtype"] == "float16" and "as requested" in record["resolved"]["dtype_reason"]


@pytest.mark.costly
@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "lorafa", "muon"])
def test_every_optimizer_steps_on_unscaled_gradients(
    optimizer: str, accelerate: bool, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scaled(monkeypatch, 2.0**8)  # no step is skipped
    words = {"optimizer": optimizer, "accelerate": accelerate, "max_steps": 2, "eval_fraction": 0.0}
    _run(settings, **words)
    _run(settings, **words, dtype="float32", output_dir=tmp_path / "whole")
    ours, wanted = (read_metrics(folder).train for folder in (tmp_path / "run", tmp_path / "whole"))
    for one, other in zip(ours, wanted, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)


@pytest.mark.costly(cases=0)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _scaled(monkeypatch, 2.0**30)  # the first steps are skipped
    whole = _run(settings, output_dir=tmp_path / "whole", max_steps=24)
    said = capsys.readouterr().out
    rows = read_metrics(tmp_path / "whole").train
    skipped = [row for row in rows if "grad_norm" not in row]
    assert 0 < len(skipped) < len(rows) and said.count("was skipped, because a gradient overflowed float16") == len(
        skipped
    )
    assert rows[-1]["skipped_steps"] == len(skipped) and any("steps were skipped" in note for note in whole.notes)
    taken = [row["learning_rate"] for row in rows if "grad_norm" in row]
    schedule = [prepare.schedule(TrainSettings(**settings), 24).rate(step) for step in range(len(taken))]
    assert taken == schedule  # skipped steps do not advance the schedule
    real = loop.save_checkpoint

    def stop(current: Any) -> Any:
        path = real(current)
        if current.state.step == 8:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(loop, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        _run(settings, max_steps=24)
    monkeypatch.setattr(loop, "save_checkpoint", real)
    snapshot = checkpoint.load(tmp_path / "run" / "checkpoint-8")
    assert snapshot.scaler["scale"] < 2.0**30 and snapshot.state.skipped_steps > 0
    _run(settings, max_steps=24, resume=True)
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    again = read_metrics(tmp_path / "run").train
    names = ("step", "loss", "learning_rate", "loss_scale", "skipped_steps")
    assert [[row[name] for name in names] for row in again] == [[row[name] for name in names] for row in rows]


def test_a_run_without_any_step_taken_is_an_error(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scaled(monkeypatch, 2.0**40)
    with pytest.raises(NonFiniteError, match="all 2 steps were skipped") as caught:
        _run(settings, max_steps=2)
    assert caught.value.where == str(tmp_path / "run") and "bfloat16" in str(caught.value)
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "checkpoint-2").exists()  # with the lower scale


@pytest.mark.parametrize("eval_fraction", [0.2, 0.0])
def test_activations_that_overflow_are_an_error_that_names_the_remedy(
    eval_fraction: float, settings: dict[str, Any], tiny_model_directory: Path
) -> None:
    weights = tiny_model_directory / "model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if name.endswith(("up_proj.weight", "gate_proj.weight")):
            tensors[name] = tensors[name] * 3e4
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(NonFiniteError) as caught:
        _run(settings, eval_fraction=eval_fraction)
    text = str(caught.value)
    assert "65,504" in text and "--dtype bfloat16" in text


def test_what_is_trained_in_the_dtype_of_the_base_is_rejected_before_weights_are_loaded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "load_model_for", None)
    with pytest.raises(ConfigError) as caught:
        _run(settings, modules_to_save=["norm"])
    assert (caught.value.field, caught.value.what) == ("dtype", "float16")
    assert not (tmp_path / "run").exists()


def test_auto_selects_float32_for_what_fp16_cannot_train(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit import hub

    turing = hub.calibration.units_of_gpu((7, 5))
    monkeypatch.setattr(hub.calibration, "units_of", lambda device: turing)
    fast = hub.Calibration(1e11, 1e11, 1e10, 0.1, "cpu", 1)
    monkeypatch.setattr(run_plan.hub, "calibrate", lambda device, with_fp16, with_int8: fast)
    result = _run(settings, dtype="auto", max_steps=1)
    assert result.dtype == "float16"
    record = json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]
    assert "compute capability 7.5" in record["dtype_reason"]
    result = _run(settings, dtype="auto", max_steps=1, modules_to_save=["norm"], output_dir=tmp_path / "saved")
    assert result.dtype == "float32"


def test_the_reason_is_printed_and_kept_when_the_run_is_resumed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit import hub

    plain = hub.calibration.units_of_cpu(("avx2",))
    monkeypatch.setattr(hub.calibration, "units_of", lambda device: plain)
    fast = hub.Calibration(9e11, 1e11, 1e10, 0.1, "cpu", 1)
    monkeypatch.setattr(run_plan.hub, "calibrate", lambda device, with_fp16, with_int8: fast)
    run(TrainSettings(**{**settings, "dtype": "auto", "max_steps": 1}), PlainProgress())
    said = capsys.readouterr().out
    assert "precision: float32: the processor has no bf16 units" in said
    run(TrainSettings(**{**settings, "dtype": "auto", "max_steps": 2, "resume": True}), PlainProgress())
    assert "precision: float32: the processor has no bf16 units" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]
    assert record["dtype_reason"].startswith("float32: the processor has no bf16 units")
