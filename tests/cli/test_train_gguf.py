"""Commands with a GGUF file as --model: from training to a merged model in safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit import hub
from lorakit.cli import main

from ..small_gguf import own_gguf_cache as own_gguf_cache
from ..small_gguf import write_gguf

pytest.importorskip("gguf")


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    return write_gguf(tmp_path / "tiny.Q8_0.gguf", tiny_llama, tiny_tokenizer, "Q8_0")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = '{"messages": [{"role": "user", "content": "what is %d?"}, {"role": "assistant", "content": "it is %d"}]}\n'
    path.write_text("".join(row % (n, n) for n in range(8)))
    return path


def test_train_eval_generate_and_merge(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run, merged = tmp_path / "run", tmp_path / "merged"
    common = ["--model", str(model)]
    train = ["train", *common, "--data", str(rows), "--output-dir", str(run), "--device", "cpu", "--dtype", "bfloat16"]
    assert main([*train, "--max-steps", "2", "--r", "2", "--max-length", "64", "--no-tuning"]) == 0
    said = capsys.readouterr().out
    assert "Q8_0" in said and "trained on the dequantized weights" in said
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    base = json.loads((run / "adapter" / "lorakit.json").read_text())["base"]
    assert list(base["files"]) == [model.name]

    adapter = ["--adapter", str(run)]
    assert main(["eval", *common, "--data", str(rows), *adapter, "--dtype", "bfloat16", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 2
    assert main(["generate", *common, *adapter, "--prompt", "what is 1?", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["merge", *common, *adapter, "--output-dir", str(merged), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    assert str(hub.load_model(merged).dtype) == "torch.bfloat16"
    assert hub.load_tokenizer(merged).chat_template is not None


def test_data_and_plan(model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(rows), "--model", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["conversations"] > 0
    assert main(["plan", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_damaged_file_stops_a_command_before_anything_is_written(
    command: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.write_bytes(model.read_bytes()[:-1])
    run = tmp_path / "run"
    flags = ["--model", str(model), "--data", str(rows), "--output-dir", str(run)]
    assert main([command, *(flags if command == "train" else [str(model)])]) == 1
    assert "truncated" in capsys.readouterr().err
    assert not run.exists()
