"""A run on a quantized base on the command line: training, resuming, evaluating, generating, merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.cli import main

pytest.importorskip("bitsandbytes")

Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path, wide_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run `lorakit train` on a small model; keywords replace flags."""
    monkeypatch.setitem(
        __import__("sys").modules, "matplotlib.figure", None
    )  # plotting takes longer than training here
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 30, encoding="utf-8")

    def call(*more: str, **flags: Any) -> int:
        given = {
            "model": wide_model_directory,
            "data": text,
            "eval-data": text,
            "output-dir": tmp_path / "run",
            "quantization": "nf4",
            "dtype": "float32",
            "max-length": 24,
            "max-steps": 6,
            "eval-steps": 2,
            "learning-rate": 0.02,
            "r": 4,
        }
        given.update({name.replace("_", "-"): value for name, value in flags.items()})
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        return main(["train", *words, *more])

    return call


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_a_run_is_trained_and_says_how_its_base_was_stored(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    out = capsys.readouterr().out
    assert "(weights " in out
    record = read(tmp_path / "run" / "run.json")
    stored = record["resolved"]["quantization"]
    assert stored["method"] == "nf4" and stored["double_quantization"] is True
    assert stored["package"].startswith("bitsandbytes ")
    assert record["result"]["best_loss"] < record["result"]["first_loss"] - 0.1
    assert record["result"]["total_parameters"] == 115_008
    assert record["result"]["base_bytes"] < 4 * 115_008 * 0.6
    sidecar = read(tmp_path / "run" / "adapter" / "lorakit.json")
    assert sidecar["training"]["quantization"] == stored and sidecar["base"]["bounds"]
    files = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "lorakit.json"} <= files


def test_resumed_is_never_interrupted(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady = ["--lr-scheduler-type", "constant", "--warmup-ratio", "0", "--save-steps", "2"]
    assert train(*steady, output_dir=tmp_path / "whole") == 0
    assert train(*steady, output_dir=tmp_path / "parts", max_steps=4) == 0
    resume = ["train", "--output-dir", str(tmp_path / "parts"), "--resume", "--max-steps", "6"]
    assert main([*resume, "--quantization", "fp4"]) == 1
    assert "quantization is 'fp4' and was 'nf4'" in capsys.readouterr().err
    assert main(resume) == 0
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"):
        one, other = (tmp_path / folder / "checkpoint-6" / name for folder in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes(), name


def test_the_adapter_serves_the_quantized_base_and_the_plain_one(
    train: Train, tmp_path: Path, wide_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    adapter = tmp_path / "run" / "adapter"
    for quantization, verdict in (("nf4", "same"), (None, "same at other precision")):
        model = hub.load_model(wide_model_directory, "float32", quantization=quantization)
        assert core.load_adapter(model, adapter).base == verdict
    capsys.readouterr()
    common = ["--model", str(wide_model_directory), "--adapter", str(adapter), "--dtype", "float32"]
    losses = {}
    for word in ("nf4", "none"):
        words = ["--quantization", word] if word != "none" else []
        assert (
            main(["eval", *common, "--data", str(tmp_path / "text.txt"), "--max-length", "24", "--json", *words]) == 0
        )
        rows = json.loads(capsys.readouterr().out)["results"]
        losses[word] = [row["loss"] for row in rows]
    record = read(tmp_path / "run" / "run.json")["result"]
    assert losses["nf4"] == pytest.approx([record["first_loss"], record["best_loss"]], abs=1e-4)
    assert losses["none"][1] < losses["none"][0] - 0.1
    assert main(["generate", *common, "--prompt", "The quick", "--max-new-tokens", "4", "--no-chat"]) == 0
    assert "trained on a base quantized as nf4" in capsys.readouterr().err
    assert main(["generate", *common, "--prompt", "The quick", "--max-new-tokens", "4", "--quantization", "nf4"]) == 0
    assert "trained on a base" not in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_merged_is_a_plain_directory(
    quantization: str | None,
    train: Train,
    tmp_path: Path,
    wide_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train() == 0
    adapter, target = tmp_path / "run" / "adapter", tmp_path / "merged"
    words = ["--quantization", quantization] if quantization else []
    common = ["merge", "--model", str(wide_model_directory), "--adapter", str(adapter), "--dtype", "float32"]
    assert main([*common, "--output-dir", str(target), *words]) == 0
    capsys.readouterr()
    base = hub.load_model(wide_model_directory, "float32", quantization=quantization)
    core.load_adapter(base, adapter)
    plain = hub.load_model(target)
    assert not hasattr(plain.config, "quantization_config")
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = torch.tensor([[5, 17, 200, 3, 9, 44]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, base(ids).logits, atol=1e-4)
    record = read(target / "lorakit_merged.json")
    assert (record["quantization"] or {}).get("method") == quantization


def test_plan_shows_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smollm2", "--quantization", "nf4", "--dtype", "bfloat16", "--verbose"]) == 0
    assert "2 × 28,346,688 + 54,998,520 (nf4 of 106,168,320)" in capsys.readouterr().out
    assert main(["plan", "smollm2", "--quantization", "nf4", "--no-double-quantization", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["job"]["quantization"] == "nf4" and values["job"]["double_quantization"] is False
    assert main(["plan", "gpt2", "--quantization", "hqq4"]) == 2
    assert "supports Linear modules, and this GPT2LMHeadModel has none" in capsys.readouterr().err
    assert main(["plan", "gpt2", "--quantization", "q4"]) == 2
    assert "quantization is 'q4'; it must be one of nf4, fp4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantization", "package"), [("int8", "bitsandbytes"), ("int8-torchao", "torchao"), ("hqq4", "hqq")]
)
def test_every_quantizer_trains(
    quantization: str, package: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package)
    assert train(quantization=quantization, eval_steps=6) == 0
    assert "MatMul8bitLt" not in capsys.readouterr().err
    result = read(tmp_path / "run" / "run.json")["result"]
    assert result["best_loss"] < result["first_loss"] - 0.1


def test_recomputed_activations_give_the_same_adapter(train: Train, tmp_path: Path) -> None:
    for folder, words in (("plain", []), ("again", ["--gradient-checkpointing"])):
        assert train(*words, output_dir=tmp_path / folder, eval_steps=6) == 0
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("plain", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_files_that_are_quantized_already_are_said_to_be(
    train: Train, tmp_path: Path, wide_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    hub.load_model(wide_model_directory, "float32", quantization="nf4").save_pretrained(packed)
    hub.load_tokenizer(wide_model_directory).save_pretrained(packed)
    assert train(model=packed) == 2
    assert "files are already quantized (bitsandbytes)" in capsys.readouterr().err
    assert train(model=packed, quantization=None) == 0
    record = read(tmp_path / "run" / "run.json")
    assert record["resolved"]["quantization"]["method"] == "nf4"
    assert "(nf4 of" in record["plan"]["lora"]["memory"]["lines"][0]["formula"]
    words = ["--model", str(packed), "--adapter", str(tmp_path / "run" / "adapter")]
    assert main(["merge", *words, "--output-dir", str(tmp_path / "merged")]) == 1
    said = capsys.readouterr().err
    assert "files are quantized (nf4)" in said and "unquantized base" in said
    assert not (tmp_path / "merged").exists()
