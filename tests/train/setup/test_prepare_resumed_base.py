"""A run records its base, tokenizer and chat template, and is resumed only with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorakit.durable import sha256_file
from lorakit.errors import BaseMismatchError, RunError
from lorakit.train.settings.settings import TrainSettings
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


def test_a_resumed_run_keeps_the_chat_template_of_its_checkpoint(short_run: dict[str, Any], tmp_path: Path) -> None:
    template, data = tmp_path / "a.jinja", tmp_path / "a.jsonl"
    turns = [{"role": role, "content": "the quick fox"} for role in ("user", "assistant")]
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 4, encoding="utf-8")
    template.write_text("{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}", encoding="utf-8")
    before = template.read_bytes()
    settings = {**short_run, "data": [data], "chat_template": str(template), "max_steps": 3, "save_steps": 1}
    run(TrainSettings(**{**settings, "max_steps": 1}))
    template.unlink()
    assert run(TrainSettings(**{**settings, "max_steps": 2}, resume=True)).steps == 2
    template.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", encoding="utf-8")
    assert run(TrainSettings(**settings, resume=True)).steps == 3
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").read_bytes() == before


def test_a_run_is_not_resumed_with_another_tokenizer(short_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {**short_run, "max_steps": 2, "save_steps": 1}
    run(TrainSettings(**{**settings, "max_steps": 1}))
    path = Path(short_run["model"]) / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    rules["model"]["merges"].pop()
    path.write_text(json.dumps(rules), encoding="utf-8")
    with pytest.raises(RunError) as caught:
        run(TrainSettings(**settings, resume=True))
    assert caught.value.what == "tokenizer"
