"""`eval` says which rows an adapter was trained on; the expected counts come from the loss of the rows themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakit import core
from lorakit.data import Request, read_records
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.run_data import seen_note
from lorakit.train.trainer import run


def rows(path: Path, numbers: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"What is {at}?", "completion": f" {at}."}) + "\n" for at in numbers))
    return path


def note(adapter: Path, *data: Path) -> str | None:
    files = core.read_adapter(adapter)
    return seen_note(files.folder, files.sidecar.facts, read_records(list(map(str, data)), Request()))


def trained(short_run: dict[str, Any], data: Path, **more: Any) -> tuple[Path, list[str], list[str]]:
    """Train, and return the adapter with the training and evaluation lines, read from the run's own split."""
    result = run(TrainSettings(**{**short_run, "data": [str(data)], "max_steps": 1, "eval_steps": 1, **more}))
    assert result.adapter is not None
    record = json.loads((result.folder / "run.json").read_text())
    count = record["evaluation_data"]["completions"] if record["evaluation_data"] else 0
    lines = data.read_text().splitlines()
    return result.adapter, lines, [str(count)]


def test_rows_of_the_training_file(short_run: dict[str, Any], tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", range(40))
    adapter, lines, (held_out,) = trained(short_run, data, eval_fraction=0.25)
    count = len(lines) - int(held_out)
    assert 0 < count < 40
    assert f"trained on {count} of these 40 rows" in str(note(adapter, data))
    single = [tmp_path / f"{at}.jsonl" for at in range(40)]
    for path, line in zip(single, lines, strict=True):
        path.write_text(line + "\n")
    found = [note(adapter, path) for path in single]  # each row alone, in a file that the run did not read
    assert sum(one is not None for one in found) == count
    checkpoint = next(adapter.parent.glob("checkpoint-*"))
    assert f"trained on {count} of these 40 rows" in str(note(checkpoint, data))
    assert note(adapter, rows(tmp_path / "new.jsonl", range(40, 60))) is None
    alone = shutil.copytree(adapter, tmp_path / "elsewhere" / "copy")
    assert f"{data} was data of its training run" in str(note(alone, data))
    assert note(alone, tmp_path / "new.jsonl") is None
    rows(data, range(1, 41))
    assert note(adapter, tmp_path / "0.jsonl") is None  # the training data is not there anymore


def test_evaluation_files_and_documents(short_run: dict[str, Any], tmp_path: Path) -> None:
    data, other = rows(tmp_path / "d.jsonl", range(12)), rows(tmp_path / "e.jsonl", range(20, 30))
    adapter, *_ = trained(short_run, data, eval_data=[str(other)])
    assert note(adapter, other) is None
    assert "trained on 12 of these 22 rows" in str(note(adapter, data, other))
    text = tmp_path / "long.txt"
    text.write_text(" ".join(f"The {at} foxes jump over {at + 1} dogs.\n" for at in range(80)))
    adapter, *_ = trained({**short_run, "output_dir": tmp_path / "text"}, text, eval_fraction=0.2)
    assert "trained on" in str(note(adapter, text))


def test_hostile_metadata(short_run: dict[str, Any], tmp_path: Path) -> None:
    records = read_records([str(rows(tmp_path / "d.jsonl", range(3)))], Request())
    for facts in ({}, {"training": 3}, {"training": {"data_sha256": [1]}}, {"training": {"data_sha256": {"a": None}}}):
        assert seen_note(tmp_path / "adapter", facts, records) is None


@pytest.fixture(autouse=True)
def _quick(short_run: dict[str, Any]) -> None:
    short_run.update(tuning=False, token_cache=False)
