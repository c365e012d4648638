"""Checks of machine, device and data before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData
from lorakit.train.progress import Progress
from lorakit.train.run_data import make_batches, read_data
from lorakit.train.settings import TrainSettings

PLAIN = TaskOnData(CAUSAL_LM, Target())


def _settings(folder: Path, **values: Any) -> TrainSettings:
    return TrainSettings(**{"model": "m", "data": ["a.txt"], "output_dir": str(folder), **values})


def test_data_is_held_out_or_given(tmp_path: Path, tiny_tokenizer: Any) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"The fox number {number} jumps over the dog.\n" * 5, encoding="utf-8")
    files = [str(tmp_path / f"{number}.txt") for number in range(8)]
    settings = _settings(tmp_path / "out", data=files[:7], per_device_train_batch_size=2)
    data = read_data(settings)
    assert (len(data.train), len(data.held_out)) == (6, 1)
    batches = make_batches(settings, data, PLAIN, tiny_tokenizer, 16, Progress())
    assert batches.held_out is not None
    lengths = [batch.input_ids.shape[1] for batch in batches.held_out()]
    assert lengths == sorted(lengths)
    assert sum(b.tokens for b in batches.held_out()) == sum(b.tokens for b in batches.held_out())
    given = read_data(settings.model_copy(update={"eval_data": files[7:]}))
    assert (len(given.train), len(given.held_out)) == (7, 1)
    assert given.note == f"Evaluation data: {files[7]}."


def test_one_document_leaves_nothing_to_hold_out(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("The fox jumps over the dog.", encoding="utf-8")
    settings = _settings(tmp_path / "out", data=[str(tmp_path / "a.txt")])
    data = read_data(settings)
    assert "a single document" in data.note
    assert make_batches(settings, data, PLAIN, tiny_tokenizer, 16, Progress()).held_out is None


def test_evaluation_rows_without_anything_to_train_say_so(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("The fox jumps over the dog.", encoding="utf-8")
    (tmp_path / "e.jsonl").write_text('{"prompt": "x", "completion": ""}\n', encoding="utf-8")
    settings = _settings(tmp_path / "out", data=[str(tmp_path / "a.txt")], eval_data=[str(tmp_path / "e.jsonl")])
    with pytest.raises(DataError, match="evaluation data: "):
        make_batches(settings, read_data(settings), PLAIN, tiny_tokenizer, 16, Progress())
