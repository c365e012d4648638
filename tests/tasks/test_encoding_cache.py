"""Rows of every task from the token cache are those that encoding gives; other labels are another entry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit import hub
from lorakit.data import TokenCache, read_records, token_cache
from lorakit.tasks import TASKS, EncodeOptions, Target

ROWS: dict[str, tuple[list[dict[str, Any]], Target]] = {
    "classification": (
        [{"text": f"one text {n}", "label": "ab"[n % 2]} for n in range(9)],
        Target("class", ("a", "b")),
    ),
    "classification of pairs": (
        [{"sentence1": f"one {n}", "sentence2": "two", "label": ["a", "b"][: n % 3]} for n in range(1, 9)],
        Target("classes", ("a", "b")),
    ),
    "classification by score": ([{"text": f"one text {n}", "label": n / 4} for n in range(9)], Target("score")),
    "token-classification": (
        [{"tokens": ["a", "fox", str(n)], "tags": ["O", "B", "O"]} for n in range(9)],
        Target("tags", ("B", "O")),
    ),
    "seq2seq": ([{"source": f"one {n}", "target": f"two {n}"} for n in range(9)], Target()),
    "embedding": ([{"anchor": f"one {n}", "positive": f"two {n}", "negative": "x"} for n in range(9)], Target("pairs")),
    "embedding by score": (
        [{"sentence1": f"one {n}", "sentence2": "two", "score": n / 10} for n in range(9)],
        Target("score"),
    ),
}

INPUTS = dict.fromkeys(("reading", "tokenizer", "template", "code"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1)
    return []


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("case", ROWS)
def test_the_second_result_is_the_same_and_does_not_tokenize(
    case: str, tmp_path: Path, said: list[str], tiny_tokenizer: Any, tiny_model_directory: Path
) -> None:
    if case.startswith("embedding"):
        pytest.importorskip("sentence_transformers")
        (tiny_model_directory / "chat_template.jinja").unlink()
    rows, target = ROWS[case]
    task = TASKS[case.split()[0]]
    target = task.on_model(target, hub.resolve(tiny_model_directory))
    names = [write(tmp_path / "a.jsonl", rows[:5]), write(tmp_path / "b.jsonl", rows[5:])]
    options = EncodeOptions(8)
    plain = task.encode(read_records(names), tiny_tokenizer, target, options)
    options = dataclasses.replace(
        options, cache=TokenCache(tmp_path / "cache", {**INPUTS, "reading": task.name}, said.append)
    )
    first = task.encode(read_records(names), tiny_tokenizer, target, options)
    (entry,) = (tmp_path / "cache").iterdir()

    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("tokenized again")

    second = task.encode(read_records(names), type("Silent", (), {"__call__": fails})(), target, options)  # type: ignore[arg-type]
    for found in (first, second):
        assert list(found.sequences) == list(plain.sequences)
        assert found.report == plain.report and found.sources == plain.sources
        assert list(found.record_of) == list(plain.record_of)
    assert [count for _, count in second.sources] == [5, len(rows) - 5]
    one = [task.encode_one(record, tiny_tokenizer, target, options)[0] for record in read_records(names)]
    assert one == list(plain.sequences)
    raw = (entry / "labels").read_bytes() or (entry / "ids").read_bytes()
    damaged = entry / ("labels" if (entry / "labels").stat().st_size else "ids")
    damaged.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    assert list(task.encode(read_records(names), tiny_tokenizer, target, options).sequences) == list(plain.sequences)
    assert len(said) == 1 and str(entry) in said[0]


def test_other_labels_and_other_tasks_are_other_entries(
    tmp_path: Path, said: list[str], tiny_tokenizer: Any, tiny_model_directory: Path
) -> None:
    (tiny_model_directory / "chat_template.jinja").unlink()
    cache = TokenCache(tmp_path / "cache", INPUTS, said.append)
    rows, target = ROWS["classification of pairs"]
    path = write(tmp_path / "a.jsonl", [{**row, "label": "a"} for row in rows])
    options = EncodeOptions(32, cache=cache)
    classification, embedding = TASKS["classification"], TASKS["embedding"]
    found = [classification.encode(read_records(path), tiny_tokenizer, target, options)]
    for other in (Target("class", ("a", "b")), Target("class", ("b", "a")), Target("class", ("b", "a"), note="auto")):
        found.append(classification.encode(read_records(path), tiny_tokenizer, other, options))
    assert [one.sequences[0].labels[0] for one in found] == [0, 0, 1, 1]
    assert found[-1].report.notes[-1] == "auto"
    classification.encode(read_records(path), tiny_tokenizer, target, dataclasses.replace(options, max_length=6))
    classification.encode(read_records(path), tiny_tokenizer, target, dataclasses.replace(options, overlong="drop"))
    assert len(list((tmp_path / "cache").iterdir())) == 6
    pytest.importorskip("sentence_transformers")
    pairs = embedding.on_model(Target("pairs"), hub.resolve(tiny_model_directory))
    embedding.encode(read_records(path), tiny_tokenizer, pairs, options)
    assert len(list((tmp_path / "cache").iterdir())) == 7
    write(path, [{**row, "label": "b"} for row in rows])
    assert classification.encode(read_records(path), tiny_tokenizer, target, options).sequences[0].labels[0] == 1
    assert len(list((tmp_path / "cache").iterdir())) == 8 and said == []


def test_rows_without_labels_are_not_cached(tmp_path: Path, said: list[str], tiny_tokenizer: Any) -> None:
    rows, target = ROWS["classification"]
    options = EncodeOptions(32, cache=TokenCache(tmp_path / "cache", INPUTS, said.append), is_labeled=False)
    found = TASKS["classification"].encode(
        read_records(write(tmp_path / "a.jsonl", rows)), tiny_tokenizer, target, options
    )
    assert len(found.sequences) == 9 and not (tmp_path / "cache").exists()


def test_every_option_that_may_change_tokens_is_an_input_of_their_key() -> None:
    named = {one.name for one in dataclasses.fields(EncodeOptions)}
    assert named - EncodeOptions(8).inputs().keys() == {"watch", "cache", "visit", "is_labeled", "shown"}
