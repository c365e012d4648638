"""`lorakit list`: the adapters in a directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main
from lorakit.train.files import run_folder

Save = Callable[[str], Path]


def test_adapters_and_runs(save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, root = save_adapter("one"), tmp_path / "all"
    for name in ("a", "run/adapter", "run/checkpoints/checkpoint-3", ".hidden", "damaged"):
        shutil.copytree(one, root / name)
    (root / "damaged" / "adapter_config.json").write_text("{")
    sidecar = json.loads((root / "run" / "adapter" / "lorakit.json").read_text())
    sidecar["training"] = {"eval_loss": 1.25}
    (root / "run" / "adapter" / "lorakit.json").write_text(json.dumps(sidecar))
    capsys.readouterr()
    assert main(["list", str(root)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["adapter", "base", "rate", "steps", "data", "loss:", "base", "→", "adapter"]
    assert [line.split()[0] for line in lines[2:]] == ["a", "damaged", "run"]
    assert "– → 1.2500" in lines[-1]
    assert "warning: damaged: " in said.err and "not valid JSON" in said.err
    assert main(["list", str(root), "--json"]) == 0
    found = {one["adapter"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["run/adapter"]["eval_loss"] == 1.25 and found["a"]["eval_loss"] is None
    assert found["a"]["r"] > 0 and "error" in found["damaged"]


def record(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, **values}))


def test_runs(save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, root = save_adapter("one"), tmp_path / "runs"
    for at, loss in enumerate((2.5, 1.5), start=1):
        run = root / f"a-long-name-of-a-run-{at}"
        shutil.copytree(one, run / "adapter")
        sidecar = json.loads((run / "adapter" / "lorakit.json").read_text())
        sidecar["training"] = {"eval_loss": loss, "base_eval_loss": 3.0, "step": 40 - at}
        (run / "adapter" / "lorakit.json").write_text(json.dumps(sidecar))
        settings = {"learning_rate": at * 1e-4, "data": ["data/train-with-a-long-name.jsonl", "b.txt"]}
        record(run, status="finished", settings=settings, resolved={"base": "x"}, result={"steps": 40})
    record(
        root / "failed", status="failed", settings={"model": "owner/model"}, error={"code": "E", "message": "no room"}
    )
    record(root / "stopped", status="interrupted", settings={}, result={"steps": 7})
    record(root / "killed", status="running", settings={})
    (root / "killed-early").mkdir()
    (root / "killed" / "tensorboard").mkdir()
    assert main(["list", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line.split()[0]: line for line in lines[2:]}
    assert list(shown) == [
        "…ong-name-of-a-run-1",
        "…ong-name-of-a-run-2",
        "failed",
        "killed",
        "killed-early",
        "stopped",
    ]
    cells = ["tiny", "0.0001", "39", "…ame.jsonl", "+1", "3.0000", "→", "2.5000"]
    assert shown["…ong-name-of-a-run-1"].split()[1:] == cells
    assert shown["failed"].split() == ["failed", "model", "failed"]
    assert [shown[name].split()[-1] for name in ("killed", "stopped")] == ["interrupted", "interrupted"]
    assert shown["killed-early"].split() == ["killed-early", "not", "started"]
    assert main(["list", str(root), "--json", "--sort", "loss"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one.get("eval_loss") for one in found] == [1.5, 2.5, None, None, None, None]
    assert [one["failure"] for one in found if "failure" in one] == ["no room"]
    assert main(["list", str(root), "--sort", "color"]) == 2
    lock = run_folder.lock(root / "killed")
    try:
        assert main(["list", str(root)]) == 0
        assert "running" in capsys.readouterr().out
    finally:
        run_folder.unlock(lock)


@pytest.mark.parametrize(
    ("base", "loss", "is_diverged"),
    [
        *[(4.79, 10.84, True), (0.69, 37.5, True), (6.2, 10.84, True), (900.0, 1400.0, True)],
        *[(2.0, 1.0, False), (2.0, 2.4, False), (0.01, 0.05, False), (900.0, 1100.0, False), (None, 11.0, False)],
    ],
)
@pytest.mark.parametrize("is_evaluated", [True, False])
def test_a_diverged_run_is_marked(
    base: float | None,
    loss: float,
    is_diverged: bool,
    is_evaluated: bool,
    save_adapter: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "one"
    shutil.copytree(save_adapter("made"), run / "adapter")
    record(run, status="finished", settings={"learning_rate": 1e6})
    if is_evaluated:
        facts = json.loads((run / "adapter" / "lorakit.json").read_text())
        facts["training"] = {"base_eval_loss": base, "eval_loss": loss}
        (run / "adapter" / "lorakit.json").write_text(json.dumps(facts))
    else:
        losses = [*([] if base is None else [base]), loss, loss + 1, loss]
        rows = [json.dumps({"step": step, "loss": found}) + "\n" for step, found in enumerate(losses)]
        (run / "metrics.jsonl").write_text("".join(rows))
    capsys.readouterr()
    assert main(["list", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr()
    assert ("diverged" in said.out) is is_diverged
    assert ("warning: one/adapter: the loss is " in said.err) is is_diverged


def test_the_reason_of_a_failure_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "run", status="failed", settings={}, error={"message": "step 3: the loss is nan"})
    assert main(["list", str(tmp_path)]) == 0
    assert "warning: run: step 3: the loss is nan" in capsys.readouterr().err


def test_a_directory_without_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 1
    assert "no adapters found" in capsys.readouterr().err
    assert main(["list", str(tmp_path / "no")]) == 1
    assert "directory not found" in capsys.readouterr().err
