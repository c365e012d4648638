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


@pytest.fixture
def wide_bert_directory(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A masked language model, without a pooler and a classifier, whose widths are multiples of 64."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.BertConfig(**sizes, vocab_size=len(tiny_tokenizer), initializer_range=0.1)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


FORMATS = [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("int8-torchao", "torchao"), ("hqq4", "hqq")]
"""Quantizations, and the packages that implement them."""
QUANTIZED = pytest.mark.parametrize(("quantization", "package"), FORMATS)


QUANTIZED_BASES = [
    pytest.param(base, *one, id="-".join((base, *one)), marks=() if number % 2 == place else (pytest.mark.slow,))
    for place, base in enumerate(("wide_model_directory", "wide_bert_directory"))
    for number, one in enumerate(FORMATS)
]
"""Every format on every base."""


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize(("base", "quantization", "package"), QUANTIZED_BASES)
def test_a_new_head_on_a_quantized_base(
    base: str, quantization: str, package: str, reviews: Path, call: Call, tmp_path: Path, capsys: Any, request: Any
) -> None:
    pytest.importorskip(package)
    model, run, merged = request.getfixturevalue(base), tmp_path / "run", tmp_path / "merged"
    assert train(call, model, reviews, run, "--quantization", quantization) == 0
    found = result(run)
    assert found["adapter_loss"] < found["first_loss"]
    flags = ["--model", model, "--adapter", run, "--quantization", quantization]
    capsys.readouterr()
    assert call("eval", *flags, "--data", reviews, "--dtype", "float32", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["loss"] == pytest.approx(found["adapter_loss"], abs=1e-3)
    assert call("merge", *flags, "--output-dir", merged, "--dtype", "float32") == 0
    capsys.readouterr()
    assert call("eval", "--model", merged, "--data", reviews, "--dtype", "float32", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["loss"] == pytest.approx(found["adapter_loss"], abs=2e-2 if quantization == "int8" else 1e-3)


@pytest.mark.costly
@pytest.mark.parametrize("base", ["wide_model_directory", "wide_bert_directory"])
@pytest.mark.parametrize("more", [(), ("--lora-bias",), ("--bias", "all"), ("--task", "embedding")], ids=str)
def test_planned_parameters_are_those_trained(
    base: str, more: tuple[str, ...], reviews: Path, call: Call, tmp_path: Path, request: Any
) -> None:
    """A masked language model lacks the pooler, which classification trains and embeddings do not use."""
    run, data = tmp_path / "run", reviews
    if "embedding" in more:
        pytest.importorskip("sentence_transformers")
        (request.getfixturevalue(base) / "chat_template.jinja").unlink()
        data = tmp_path / "pairs.jsonl"
        data.write_text("".join(json.dumps({"anchor": f"q {at}", "positive": f"a {at}"}) + "\n" for at in range(24)))
    assert train(call, request.getfixturevalue(base), data, run, *more) == 0
    plan = json.loads((run / "run.json").read_text())["plan"]
    found = result(run)
    assert plan["adapter"]["trainable"] == found["trainable_parameters"]
    assert plan["model"]["parameters"] == found["total_parameters"]


@QUANTIZED
@pytest.mark.parametrize("task", ["classification", "token-classification", "encoder"])
@pytest.mark.parametrize("base", ["wide_model_directory", "wide_bert_directory"])
def test_new_modules_are_not_quantized(base: str, task: str, quantization: str, package: str, request: Any) -> None:
    import torch

    from lorakit import hub
    from lorakit.core.model.base_view import quantized_weights
    from lorakit.plan.quantized import quantized_sites, storage_named

    pytest.importorskip(package)
    source = hub.resolve(request.getfixturevalue(base))
    values = {"id2label": {0: "a", 1: "b"}} if task != "encoder" else {}
    loaded = hub.load_for_task(source, hub.LoadOptions("float32", quantization=quantization), task, values)
    assert bool(loaded.new_modules) == (task != "encoder")
    for path in loaded.new_modules:
        parameters = list(loaded.model.get_submodule(path).parameters())
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        assert all(parameter.requires_grad for parameter in parameters)
    planned = quantized_sites(hub.shape_for_task(source, task, values), storage_named(quantization))
    assert [w.name for w in quantized_weights(loaded.model)] == [f"{site.path}.weight" for site in planned]
