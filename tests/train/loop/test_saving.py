"""The metrics of a run's task at its steps, as recorded in `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.train.loop import saving

ROWS = (
    {"step": 0, "eval_loss": 1.0, "eval_f1": 0.2, "eval_accuracy": 0.3, "eval_f1/cat": 0.1},
    {"step": 1, "loss": 0.9},
    {"step": 2, "eval_loss": 0.8, "eval_accuracy": 0.5, "eval_f1": 0.4},
    {"step": 2, "eval_loss": 0.7, "eval_accuracy": 0.6, "eval_f1": 0.5},  # after resuming at step 2
)


def run_in(folder: Path, summary: tuple[str, ...]) -> Any:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return SimpleNamespace(
        spec=SimpleNamespace(folder=folder, task=SimpleNamespace(task=SimpleNamespace(summary=summary)))
    )


def test_the_metrics_of_several_steps_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read = run_in(tmp_path, ("accuracy", "f1")), []
    real = saving.read_metrics
    monkeypatch.setattr(saving, "read_metrics", lambda folder: read.append(folder) or real(folder))
    found = saving.metrics_at(run, 2, 0, 5, None)
    assert found == [{"accuracy": 0.6, "f1": 0.5}, {"accuracy": 0.3, "f1": 0.2}, {}, {}]
    assert [list(one) for one in found[:2]] == [["accuracy", "f1"]] * 2
    assert read == [tmp_path]


def test_nothing_is_read_for_a_task_without_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "read_metrics", lambda _: pytest.fail("read"))
    assert saving.metrics_at(run_in(tmp_path, ()), 0, 2) == [{}, {}]
