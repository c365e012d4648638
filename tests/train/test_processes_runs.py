"""Whole runs in two processes: files, checkpoints, resumption, and errors that end both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.report import read_metrics
from lorakit.train import checkpoint
from lorakit.train.settings import TrainSettings
from lorakit.train.trainer import run

from .processes import start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small run, as plain JSON values."""
    plain = {**short_run, "data": [str(path) for path in short_run["data"]], "model": str(short_run["model"])}
    steady = {"lr_scheduler_type": "constant", "warmup_steps": 0, "tuning": False, "token_cache": False}
    return {**plain, **steady, "output_dir": str(short_run["output_dir"]), "eval_fraction": 0.2, "eval_steps": 2}


@pytest.fixture
def outcomes(tmp_path: Path) -> Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
    """Function that makes runs one after another in two processes, and returns the outcomes of each process."""

    def make(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        path = tmp_path / "runs.json"
        path.write_text(json.dumps(runs))
        start("process_runs", path, tmp_path)
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    return make


def test_a_run_equals_that_of_one_process_and_resumes(
    settings: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    two, whole, alone = (str(tmp_path / name) for name in ("two", "whole", "alone"))
    noisy = {**settings, "lora_dropout": 0.2}
    parts = {**noisy, "output_dir": str(tmp_path / "parts")}
    runs = [
        {**settings, "output_dir": two, "max_steps": 6},
        {**noisy, "output_dir": whole, "max_steps": 6},
        {**parts, "max_steps": 4},
        {**parts, "max_steps": 6, "resume": True},
    ]
    first, second = outcomes(runs)
    assert first == second
    assert [one["ending"] for one in first] == ["finished"] * 4
    run(TrainSettings(**{**settings, "output_dir": alone, "max_steps": 6, "gradient_accumulation_steps": 2}))
    rows, expected = read_metrics(Path(two)), read_metrics(Path(alone))
    assert [row["tokens"] for row in rows.train] == [row["tokens"] for row in expected.train]
    assert [r["loss"] for r in rows.train] == pytest.approx([r["loss"] for r in expected.train], rel=1e-5)
    assert [r["eval_loss"] for r in rows.evaluations] == pytest.approx(
        [r["eval_loss"] for r in expected.evaluations], rel=1e-5
    )
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["processes"] == {"count": 2, "seeds": [settings.get("seed", 0), settings.get("seed", 0) + 1]}
    assert (record["resolved"]["processes"], record["resolved"]["accumulation"]) == (2, 2)
    saved = checkpoint.load(tmp_path / "whole" / "checkpoint-6")
    assert len(saved.others) == 1
    assert saved.random_of(0, 2) is not None
    assert saved.random_of(0, 1) is None
    result = run(TrainSettings(**{**noisy, "output_dir": whole, "resume": True, "max_steps": 8}))
    assert (result.ending, result.steps) == ("finished", 8)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["resolved"]["accumulation"] == 2


def test_errors_that_end_all_processes(settings: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Quite another text, about nothing. " * 4)
    (tmp_path / "cwd").mkdir()
    base = {**settings, "max_steps": 3}
    cases: dict[str, dict[str, Any]] = {
        "seed": {**base, "by_rank": {"1": {"seed": 5}}},
        "data": {**base, "by_rank": {"1": {"data": [str(other)]}}},
        "output_dir": {**base, "output_dir": "here", "by_rank": {"1": {"cwd": str(tmp_path / "cwd")}}},
        "fit": {**base, "fit": "8GB"},
        "model": {**base, "by_rank": {"1": {"model": str(tmp_path / "missing")}}},
        "rows": {**base, "data": base["data"][:1], "max_length": 128, "eval_fraction": 0},
        "nan": {
            **base,
            "output_dir": str(tmp_path / "nan"),
            "learning_rate": 1e30,
            "max_grad_norm": 0,
            "save_steps": 1,
        },
    }
    first, second = outcomes(list(cases.values()))
    kinds = dict(zip(cases, first, strict=True))
    assert kinds["seed"]["field"] == "seed"
    assert "5 in process 1" in kinds["seed"]["message"]
    assert kinds["data"]["field"] == "data"
    assert kinds["output_dir"]["field"] == "output_dir"
    assert kinds["output_dir"]["message"].startswith("process 1: ")
    assert kinds["fit"]["kind"] == "NotYetSupported"
    assert kinds["model"]["message"].startswith("process 1: ")
    assert (kinds["rows"]["kind"], kinds["rows"]["field"]) == ("DataError", "data")
    assert kinds["nan"]["kind"] == "NonFiniteError"
    assert checkpoint.newest_valid(tmp_path / "nan") == tmp_path / "nan" / "checkpoint-1"
    assert [one["kind"] for one in first] == [one["kind"] for one in second]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cwd" / "here").exists()
