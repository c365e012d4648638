"""`lorakit train`, `eval`, `predict` and `merge` with a new classification head: without a padding token, and quantized."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli

Call = Callable[..., int]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    return lambda command, *words: cli.main([command, *map(str, words)])


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Twenty-four rows with two classes."""
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"{('good', 'bad')[at % 2]} film number {at}", ("yes", "no")[at % 2]] for at in range(24))
    return path


def train(call: Call, model: Path, data: Path, run: Path, *more: object) -> int:
    flags = ["--model", model, "--data", data, "--eval-data", data, "--output-dir", run, "--dtype", "float32"]
    return call("train", *flags, "--max-length", 64, "--r", 2, "--max-steps", 8, "--lr", "1e-2", *more)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["result"]
    return found


def test_a_decoder_without_a_padding_token_is_merged(
    wide_model_directory: Path, reviews: Path, call: Call, tmp_path: Path, capsys: Any
) -> None:
    config = json.loads((wide_model_directory / "config.json").read_text())
    assert config.get("pad_token_id") is None
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert train(call, wide_model_directory, reviews, run) == 0
    flags = ["--model", wide_model_directory, "--adapter", run]
    assert call("merge", *flags, "--output-dir", merged) == 0
    assert json.loads((merged / "config.json").read_text())["pad_token_id"] == 0
    capsys.readouterr()
    assert call("eval", "--model", merged, "--data", reviews, "--dtype", "float32", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["loss"] == pytest.approx(result(run)["adapter_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("quantization", "package"),
    [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("int8-torchao", "torchao"), ("hqq4", "hqq")],
)
def test_a_new_head_on_a_quantized_base(
    quantization: str,
    package: str,
    wide_model_directory: Path,
    reviews: Path,
    call: Call,
    tmp_path: Path,
    capsys: Any,
) -> None:
    pytest.importorskip(package)
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert train(call, wide_model_directory, reviews, run, "--quantization", quantization) == 0
    found = result(run)
    assert found["adapter_loss"] < found["first_loss"]
    flags = ["--model", wide_model_directory, "--adapter", run, "--quantization", quantization]
    capsys.readouterr()
    assert call("eval", *flags, "--data", reviews, "--dtype", "float32", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["loss"] == pytest.approx(found["adapter_loss"], abs=1e-3)
    assert call("merge", *flags, "--output-dir", merged, "--dtype", "float32") == 0
    capsys.readouterr()
    assert call("eval", "--model", merged, "--data", reviews, "--dtype", "float32", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["loss"] == pytest.approx(found["adapter_loss"], abs=2e-2 if quantization == "int8" else 1e-3)
