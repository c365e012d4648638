"""`lorakit generate --base-matmul int8`: where the input scales come from, what is reported, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit import core, hub
from lorakit.cli import main
from lorakit.generate import generate
from lorakit.session.base_matmul import unsupported
from lorakit.session.prompts import encode_prompts

needs_units = pytest.mark.skipif(bool(unsupported(torch.device("cpu"))), reason="the processor has no int8 units")
TOKENS = 6
INT8 = ("--base-matmul", "int8")


def asked(capsys: pytest.CaptureFixture[str], model: Path, *words: Any) -> tuple[dict[str, Any], str]:
    """Return the JSON output and standard error."""
    given = ["generate", "--model", model, "--prompt", "hello", "--max-new-tokens", TOKENS, "--json", *words]
    assert main([*map(str, given)]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def by_hand(directory: Path, adapter: Path, quantize: Callable[[Any, list[int]], object]) -> str:
    tokenizer, model = hub.load_tokenizer(directory), hub.load_model(directory)
    core.load_adapter(model, adapter)
    ids = encode_prompts(["hello"], tokenizer, "chat", None)[0]
    quantize(model, ids)
    made = list(generate(model, ids, max_new_tokens=TOKENS, eos_ids=(0,)))
    return str(tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.costly(cases=0)
@needs_units
def test_the_scales_of_the_run_that_trained_the_adapter(
    tmp_path: Path, wide_model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)  # plotting takes longer than training
    text, run = tmp_path / "text.jsonl", tmp_path / "run"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick brown fox"}]
    text.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    flags = {"model": wide_model_directory, "data": text, "output-dir": run, "max-steps": 1, "r": 4}
    flags |= {"base-matmul": "int8", "int8-loss-bound": 9}
    assert main(["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]) == 0
    capsys.readouterr()
    adapter, scales = run / "adapter", run / "int8.safetensors"
    found, said = asked(capsys, wide_model_directory, "--adapter", run, *INT8)
    assert found["base_matmul"] == "int8"
    assert "int8 in 14 layers" in said and "int8.safetensors" in " ".join(said.split())
    expected = by_hand(wide_model_directory, adapter, lambda m, _: core.quantize_with_scales(m, load_file(scales)))
    assert [answer["text"] for answer in found["results"][0]["answers"]] == [expected]
    scales.write_bytes(scales.read_bytes()[:-1] + b"\1")  # not the file that the adapter's metadata describes
    _, said = asked(capsys, wide_model_directory, "--adapter", run, *INT8)
    assert "calibrated on the prompts" in " ".join(said.split())


@needs_units
def test_without_a_run_the_prompts_are_the_calibration_data(
    wide_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = asked(capsys, wide_model_directory, *INT8, "--prompt", "hello world")
    assert found["base_matmul"] == "int8" and len(found["results"]) == 2
    tokenizer = hub.load_tokenizer(wide_model_directory)
    tokens = sum(map(len, encode_prompts(["hello", "hello world"], tokenizer, "chat", None)))
    assert f"int8 in 14 layers, calibrated on the prompts ({tokens} tokens)" in " ".join(said.split())
    plain, said = asked(capsys, wide_model_directory)
    assert plain["base_matmul"] == "dtype" and "int8" not in said


def test_without_int8_units_the_base_keeps_its_dtype(
    wide_model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.session.base_matmul.unsupported", lambda _: "there are no units")
    found, said = asked(capsys, wide_model_directory, *INT8)
    assert found["base_matmul"] == "dtype" and "there are no units" in said


@pytest.mark.parametrize("other", [("--quantization", "nf4"), ("--merged", "--adapter", "x")], ids=" ".join)
def test_what_also_changes_the_base_is_rejected(
    other: tuple[str, ...], wide_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(wide_model_directory), "--prompt", "hello", *INT8, *other]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--base-matmul int8" in said and other[0] in said


def test_an_unknown_matmul_is_rejected(wide_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(wide_model_directory), "--prompt", "hello", "--base-matmul", "int4"]) == 2
    assert "int8" in capsys.readouterr().err
