"""`lorakit list`: the adapters in a directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main
from lorakit.train import run_folder

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
    assert main(["list", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line.split()[0]: line for line in lines[2:]}
    assert list(shown) == ["…ong-name-of-a-run-1", "…ong-name-of-a-run-2", "failed", "killed", "stopped"]
    cells = ["tiny", "0.0001", "39", "…ame.jsonl", "+1", "3.0000", "→", "2.5000"]
    assert shown["…ong-name-of-a-run-1"].split()[1:] == cells
    assert shown["failed"].split() == ["failed", "model", "failed"]
    assert [shown[name].split()[-1] for name in ("killed", "stopped")] == ["interrupted", "interrupted"]
    assert main(["list", str(root), "--json", "--sort", "loss"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one.get("eval_loss") for one in found] == [1.5, 2.5, None, None, None]
    assert [one["failure"] for one in found if "failure" in one] == ["no room"]
    assert main(["list", str(root), "--sort", "color"]) == 2
    lock = run_folder.lock(root / "killed")
    try:
        assert main(["list", str(root)]) == 0
        assert "running" in capsys.readouterr().out
    finally:
        run_folder.unlock(lock)


def test_a_directory_without_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 1
    assert "no adapters found" in capsys.readouterr().err
    assert main(["list", str(tmp_path / "no")]) == 1
    assert "directory not found" in capsys.readouterr().err
