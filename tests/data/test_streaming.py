"""Batches of a stream: every training row once per epoch, exact positions, held-out rows, invalid rows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Request, encode, streaming
from lorakit.data.encoding import encode_record
from lorakit.data.reading import open_stream, streamable_bytes
from lorakit.data.records import content_key
from lorakit.data.sources import Place
from lorakit.data.streaming import StreamLoader, read_stream
from lorakit.data.text_files import PART_BYTES
from lorakit.errors import ConfigError, DataError

LENGTH = 16


def write(path: Path, count: int, first: int = 0) -> str:
    rows = [{"text": f"row {number} of the data, " * (1 + number % 4)} for number in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def loader_of(split: Any, tokenizer: Any, seed: int = 3, rows: int = 4) -> StreamLoader:
    sample = encode(split.train, tokenizer, LENGTH).sequences
    return StreamLoader(
        sample, rows, seed, rows=split.rows, encode=lambda row: encode_record(row, tokenizer, LENGTH, "truncate")
    )


def key(batch: Any) -> tuple[Any, ...]:
    return batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.labels.tolist(), batch.epoch


def tokens(batches: Any) -> list[list[int]]:
    return sorted(
        [token for token, label in zip(ids, mask, strict=True) if label]
        for batch in batches
        for ids, mask in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
    )


def epoch_of(loader: StreamLoader) -> list[Any]:
    found = [next(loader)]
    while not loader.epoch.is_integer():
        found.append(next(loader))
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 10)


@pytest.mark.usefixtures("small_blocks")
def test_an_epoch_has_every_training_row_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    names = [write(tmp_path / "a.jsonl", 23), write(tmp_path / "b.jsonl", 9, 100)]
    split = read_stream(names, None, 0.2, 0, Request())
    assert 0 < len(split.held_out) < 20 and len(split.train) + len(split.held_out) == 32
    loader = loader_of(split, tiny_tokenizer)
    first, second = epoch_of(loader), epoch_of(loader)
    assert (first[-1].epoch, second[-1].epoch) == (1, 2)
    epochs = [batch.epoch for batch in first]
    assert epochs == sorted(set(epochs)) and not any(epoch.is_integer() for epoch in epochs[:-1])
    assert tokens(first) == tokens(second) == sorted(list(one.input_ids) for one in loader.sequences)
    assert [key(batch)[0] for batch in first] != [key(batch)[0] for batch in second]
    assert all(len(batch.input_ids) == 4 for batch in first[:-1])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_state_gives_the_batches_that_would_have_come(tmp_path: Path, tiny_tokenizer: Any, suffix: str) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    if suffix == "txt":
        path = str(tmp_path / "a.txt")
        Path(path).write_text("the quick fox jumps over the dog\n" * 60, encoding="utf-8")
    split = read_stream([path], None, 0.1 if suffix == "jsonl" else 0.0, 0, Request())
    for taken in range(24):
        loader = loader_of(split, tiny_tokenizer)
        for _ in range(taken):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = [key(batch) for batch in itertools.islice(loader, 30)]
        other = loader_of(split, tiny_tokenizer)
        other.load_state(state)
        assert other.state() == state
        assert [key(batch) for batch in itertools.islice(other, 30)] == expected, taken


def test_a_state_of_other_data_or_settings_is_an_error(tmp_path: Path, tiny_tokenizer: Any) -> None:
    split = read_stream([write(tmp_path / "a.jsonl", 5)], None, 0, 0, Request())
    state = loader_of(split, tiny_tokenizer).state()
    other = read_stream([write(tmp_path / "b.jsonl", 6)], None, 0, 0, Request())
    with pytest.raises(DataError, match="the data changed"):
        loader_of(other, tiny_tokenizer).load_state(state)
    with pytest.raises(DataError, match="seed, batch_rows changed"):
        loader_of(split, tiny_tokenizer, seed=4, rows=5).load_state(state)
    for wrong in ({"block": [7, 0, 1, 0]}, {"block": None}, {"batch": -1}, {"epoch": "x"}):
        with pytest.raises(DataError, match="not valid"):
            loader_of(split, tiny_tokenizer).load_state({**state, **wrong})


def test_held_out_rows_do_not_depend_on_other_rows_and_are_never_trained(tmp_path: Path, tiny_tokenizer: Any) -> None:
    few, many = write(tmp_path / "few.jsonl", 30), write(tmp_path / "many.jsonl", 60)
    first, second = (read_stream([name], None, 0.3, 1, Request()) for name in (few, many))
    held = {content_key(record) for record in first.held_out}
    assert held and held == {content_key(record) for record in second.held_out[: len(held)]}
    trained = {content_key(row.record) for row in second.rows.rows(Place())}
    assert not trained & {content_key(record) for record in second.held_out}
    given = read_stream([many], [few], 0.3, 1, Request())
    assert len(given.held_out) == 30 and len(list(given.rows.rows(Place()))) == len(given.train) == 30


def test_parts_of_a_text_file(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    text = (
        "\ufeff"
        + "".join(f"Zeile {number} für 狐 und 😀\n" for number in range(9000))
        + "x" * (2 * PART_BYTES)
        + "😀" * 70000
    )
    path.write_text(text, encoding="utf-8")
    rows = list(open_stream([str(path)], Request()).rows(Place()))
    assert "".join(row.record.text for row in rows) == text[1:]
    assert [row.record.is_first for row in rows] == [True] + [False] * (len(rows) - 1)
    assert [row.record.is_last for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[1].record.line == 1 + rows[0].record.text.count("\n")
    tiny_tokenizer.bos_token = "<|im_start|>"
    ids = [encode_record(row.record, tiny_tokenizer, 1 << 20, "truncate")[0].input_ids for row in rows]
    assert [part[-1] == tiny_tokenizer.eos_token_id for part in ids] == [row.record.is_last for row in rows]


def test_an_invalid_row_after_the_first_part(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE_BYTES", 100)
    monkeypatch.setattr(streaming, "_LEAST_BYTES", 100)
    path = write(tmp_path / "a.jsonl", 20)
    with Path(path).open("ab") as file:
        file.write(b'{"text": 3}\n{"text": "\xff"}\n{"text": "the last row"}\n')
    loader = loader_of(read_stream([path], None, 0, 0, Request()), tiny_tokenizer)
    before = loader.state()
    with pytest.raises(DataError) as caught:
        next(loader)
    assert caught.value.where == f"{path}:21" and caught.value.field == "on_bad_row"
    assert loader.state() == before
    skipped = list[tuple[str, str]]()
    split = read_stream([path], None, 0, 0, Request(skip_bad_rows=True), lambda *found: skipped.append(found))
    assert len(split.train) < 10
    assert len(tokens(epoch_of(loader_of(split, tiny_tokenizer)))) > 20
    assert [where for where, _ in skipped] == [f"{path}:21", f"{path}:22"]


def test_data_that_cannot_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("hello")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    lines = write(tmp_path / "a.jsonl", 2)
    (tmp_path / "a.csv").write_text("text\nhello\n")
    assert streamable_bytes([lines]) == Path(lines).stat().st_size > 0
    assert streamable_bytes([lines, str(tmp_path / "a.csv")]) == streamable_bytes([lines]) + 11
    for name in (str(tmp_path / "missing.csv"), "hf:a/b"):  # the size of a Hub data set needs the network
        assert streamable_bytes([name]) == streamable_bytes([lines, name]) == 0
    with pytest.raises(ConfigError):
        read_stream([lines], None, 1.0, 0, Request())
    for name in ("empty.jsonl", "blank.jsonl", "missing.jsonl", "missing.parquet", "a.pdf"):
        with pytest.raises(DataError) as caught:
            read_stream([str(tmp_path / name)], None, 0, 0, Request())
        assert name in str(caught.value.where)


def test_a_file_that_changes_is_an_error(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", 5)
    loader = loader_of(read_stream([path], None, 0, 0, Request()), tiny_tokenizer)
    write(Path(path), 6)
    with pytest.raises(DataError, match="changed while it was in use"):
        next(loader)
