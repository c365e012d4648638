"""A run on a base whose files are quantized: training, evaluating and merging on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.cli import main
from lorakit.core.model.base_view import quantized_weights

from .. import packed_models

IDS = torch.tensor([[5, 17, 200, 3, 9, 44]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_an_adapter_is_trained_and_merged_into_a_dense_copy(
    wide_model_directory: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed_models.write_fp8(wide_model_directory, hub.load_model(wide_model_directory, "float32"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30, encoding="utf-8")
    flags = ["--data", text, "--dtype", "float32", "--max-length", 24, "--max-steps", 3, "--learning-rate", 0.02]
    model, run = ["--model", wide_model_directory], ["--output-dir", tmp_path / "run"]
    assert main(["train", *map(str, [*model, *flags, *run, "--report-to", "none"])]) == 0
    merge = [*model, "--adapter", tmp_path / "run" / "adapter", "--output-dir", tmp_path / "out", "--dtype", dtype]
    assert main(["merge", *map(str, merge)]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    merged, base = hub.load_model(tmp_path / "out", "float32"), hub.load_model(wide_model_directory, "float32")
    assert not list(quantized_weights(merged)) and len(list(quantized_weights(base))) == 14
    before = logits(base)
    core.load_adapter(base, tmp_path / "run" / "adapter")
    assert torch.allclose(logits(base), logits(merged), atol=1e-4) and not torch.equal(logits(base), before)
