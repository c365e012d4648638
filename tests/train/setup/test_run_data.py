"""Checks of machine, device and data before weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.run_data import make_batches, read_data

from ..specified import specified

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
    batches = make_batches(specified(settings, data, PLAIN, tiny_tokenizer, 16))
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
    assert make_batches(specified(settings, data, PLAIN, tiny_tokenizer, 16)).held_out is None


def test_a_resumed_run_keeps_the_rule_of_its_split(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "label": "ab"[at % 2]} for at in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = _settings(tmp_path / "out", data=[str(path)])

    def held(record: dict[str, Any] | None) -> list[int | None]:
        return [row.line for row in read_data(settings, record).held_out]

    first = read_data(settings)
    assert (len(first.held_out), first.rule) == (12, "stratified")
    assert held({"resolved": {"split": first.rule}}) == [row.line for row in first.held_out]
    assert held({"resolved": {"split": None}}) == held({}) == held(None)  # no row was held out by a rule
    for resolved in ({"split": "of a later version"}, {"base": "of a preview, which named no rule"}):
        with pytest.raises(DataError):
            held({"resolved": resolved})


def test_the_end_of_one_document_is_evaluated_and_no_token_of_it_is_trained(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Line {at} has some words.\n" for at in range(200)), encoding="utf-8")
    settings = _settings(tmp_path / "out", data=[str(tmp_path / "a.txt")], max_length=64)
    batches = make_batches(specified(settings, read_data(settings), PLAIN, tiny_tokenizer, 64))
    assert batches.held_out_sequences is not None
    trained, held = (
        "".join(tiny_tokenizer.decode(ids[1 if at else 0 :]) for at, ids in enumerate(row.input_ids for row in part))
        for part in batches.parts
    )
    end = tiny_tokenizer.eos_token
    text = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert trained + held == text + end and held.startswith("Line ")


def test_evaluation_rows_without_anything_to_train_say_so(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("The fox jumps over the dog.", encoding="utf-8")
    (tmp_path / "e.jsonl").write_text('{"prompt": "x", "completion": ""}\n', encoding="utf-8")
    settings = _settings(tmp_path / "out", data=[str(tmp_path / "a.txt")], eval_data=[str(tmp_path / "e.jsonl")])
    with pytest.raises(DataError, match="evaluation data: "):
        make_batches(specified(settings, read_data(settings), PLAIN, tiny_tokenizer, 16))
