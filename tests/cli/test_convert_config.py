"""`lorakit convert-config`: its output, files and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import main
from lorakit.train.settings.sources import read_settings_file

AXOLOTL = """base_model: owner/model
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: rows.jsonl
    type: chat_template
evals_per_epoch: 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "axolotl.yaml"
    path.write_text(AXOLOTL)
    return path


def test_a_file_is_written_and_the_report_printed(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "settings.yaml"
    assert main(["convert-config", str(file), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Axolotl" in said and "evals_per_epoch" in said and "missing: output_dir" in said
    settings = read_settings_file(out)
    assert (settings["model"], settings["r"], settings["format"]) == ("owner/model", 8, "messages")
    before = out.read_bytes()
    assert main(["convert-config", str(file), "--output", str(out)]) == 2
    assert "will not be overwritten" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_settings_are_printed_without_an_output(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-config", str(file)]) == 0
    said = capsys.readouterr().out
    assert "# no counterpart: evals_per_epoch" in said and "\nr: 8\n" in said
    assert main(["convert-config", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tool"] == "Axolotl" and found["settings"]["r"] == 8 and found["missing"] == ["output_dir"]


def test_a_converted_file_trains(
    file: Path, tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    assert main(["convert-config", str(file), "-o", "settings.yaml"]) == 0
    more = ["--output-dir", "run", "--model", str(tiny_model_directory), "--max-steps", "1", "--max-length", "32"]
    assert main(["train", "--config", "settings.yaml", *more, "--device", "cpu", "--dtype", "float32"]) == 0
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("text", "word"), [("x: 1\n", "do not identify a tool"), ("stage: dpo\ncutoff_len: 8\n", "preferences")]
)
def test_errors(text: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "x.yaml", tmp_path / "out.yaml"
    path.write_text(text)
    assert main(["convert-config", str(path), "-o", str(out)]) == 2
    said = capsys.readouterr().err
    assert word in said and str(path) in said
    assert main(["convert-config", str(tmp_path / "gone.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_does_not_load_torch(file: Path) -> None:
    code = f"import sys; from lorakit.cli import main; main(['convert-config', {str(file)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
