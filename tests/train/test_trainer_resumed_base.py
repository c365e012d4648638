"""A run records the files of its base, and is resumed only on that base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorakit.durable import sha256_file
from lorakit.errors import BaseMismatchError
from lorakit.train.settings import TrainSettings
from lorakit.train.trainer import run

NORM = "model.layers.1.input_layernorm.weight"


def test_a_run_is_not_resumed_on_a_base_with_other_norms(short_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {**short_run, "max_steps": 2, "save_steps": 1}
    run(TrainSettings(**{**settings, "max_steps": 1}))
    sidecar = json.loads((tmp_path / "run" / "checkpoint-1" / "lorakit.json").read_text(encoding="utf-8"))
    weights = Path(short_run["model"]) / "model.safetensors"
    assert sidecar["base"]["files"] == {weights.name: sha256_file(weights)}
    before = weights.read_bytes()
    tensors = load_file(weights)
    save_file({**tensors, NORM: tensors[NORM] * 1.01}, weights, {"format": "pt"})
    with pytest.raises(BaseMismatchError, match=re.escape(NORM)):
        run(TrainSettings(**settings, resume=True))
    weights.write_bytes(before)
    assert run(TrainSettings(**settings, resume=True)).steps == 2
