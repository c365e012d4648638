"""`lorakit train --from-adapter` on the command line, and from the Hub."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lorakit import cli

Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "a.txt").write_text("The quick fox jumps over the lazy dog. " * 8, encoding="utf-8")

    def call(folder: str, *more: str) -> int:
        words = ["train", "--data", str(tmp_path / "a.txt"), "--output-dir", str(tmp_path / folder)]
        return cli.main(
            [*words, "--max-length", "32", "--max-steps", "2", "--device", "cpu", "--dtype", "float32", *more]
        )

    return call


def test_the_flags_and_the_result(
    train: Train, tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("source", "--model", str(tiny_model_directory), "--r", "4") == 0
    source = str(tmp_path / "source")
    assert train("further", "--from-adapter", source, "--from-optimizer") == 0
    assert "further (trained for 2 steps)" in capsys.readouterr().out
    assert json.loads((tmp_path / "further" / "run.json").read_text())["settings"]["model"] == str(tiny_model_directory)
    shutil.rmtree(source)
    assert train("further", "--resume") == 0
    assert train("more", "--from-adapter", source) == 1
    assert "adapter directory not found" in capsys.readouterr().err
    assert train("more") == 2
    assert "model is missing; pass --model" in capsys.readouterr().err


def test_rows_held_out_that_the_adapter_was_trained_on_are_reported(
    train: Train, tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {at} of these"}) + "\n" for at in range(10)))
    same = ("--data", str(data), "--eval-fraction", "0.5")
    call = [*same, "--max-length", "32", "--max-steps", "1", "--device", "cpu", "--dtype", "float32"]
    model, source = ("--model", str(tiny_model_directory), "--r", "2"), ("--from-adapter", str(tmp_path / "source"))
    found = {}
    for folder, more in {"source": model, "same": source, "other": (*source, "--seed", "5")}.items():
        assert cli.main(["train", *call, "--output-dir", str(tmp_path / folder), *more]) == 0
        found[folder] = "trained on" in capsys.readouterr().out
    assert found == {"source": False, "same": False, "other": True}


def test_an_adapter_on_the_hub(
    train: Train, tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("source", "--model", str(tiny_model_directory), "--r", "4") == 0
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path / "source" / "adapter")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert train("further", "--from-adapter", "owner/notes") == 0
    assert asked["repository"] == "owner/notes"
    assert {"adapter_model.safetensors", "tokenizer*", "chat_template*"} <= set(asked["allow_patterns"])
    assert json.loads((tmp_path / "further" / "run.json").read_text())["from_adapter"]["name"] == "owner/notes"
