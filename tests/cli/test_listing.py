"""`lorakit list`: the adapters in a directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.cli import main

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
    assert lines[0].split() == ["adapter", "base", "model", "task", "r", "size", "eval", "loss", "date"]
    assert [line.split()[0] for line in lines[2:]] == ["a", "damaged", "run/adapter"]
    assert "1.2500" in lines[-1]
    assert "warning: damaged: " in said.err and "not valid JSON" in said.err
    assert main(["list", str(root), "--json"]) == 0
    found = {one["adapter"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["run/adapter"]["eval_loss"] == 1.25 and found["a"]["eval_loss"] is None
    assert found["a"]["r"] > 0 and "error" in found["damaged"]


def test_a_directory_without_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 1
    assert "no adapters found" in capsys.readouterr().err
    assert main(["list", str(tmp_path / "no")]) == 1
    assert "directory not found" in capsys.readouterr().err
