"""Streams of every file format and of Hub data sets behave alike: rows, positions, held-out rows, invalid rows."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Request, encode, read_records, streaming
from lorakit.data.encoding import encode_record
from lorakit.data.reading import open_stream
from lorakit.data.records import content_key
from lorakit.data.sources import Place
from lorakit.data.streaming import StreamLoader, read_stream
from lorakit.errors import DataError

Rows = list[dict[str, Any]]
ROWS: Rows = [{"text": f'row "{number}",\nä狐 ' + "the fox " * (1 + number % 4)} for number in range(40)]
LENGTH = 128


def jsonl(folder: Path, rows: Rows) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def json_list(folder: Path, rows: Rows) -> str:
    path = folder / "a.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8-sig")
    return str(path)


def delimited(folder: Path, rows: Rows, suffix: str = "csv", delimiter: str = ",") -> str:
    path = folder / f"a.{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def tsv(folder: Path, rows: Rows) -> str:
    return delimited(folder, rows, "tsv", "\t")


def parquet(folder: Path, rows: Rows) -> str:
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tables.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=7)
    return str(folder / "a.parquet")


def arrow(folder: Path, rows: Rows) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return str(folder / "a.arrow")


def arrow_file(folder: Path, rows: Rows) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return str(folder / "a.arrow")


def hub(folder: Path, rows: Rows) -> str:
    """A local directory is loaded as a data set of the Hub is, without a network."""
    pytest.importorskip("datasets")
    (folder / "set").mkdir(exist_ok=True)
    Path(parquet(folder, rows)).rename(folder / "set" / "train.parquet")
    return "hf:set"


FORMATS: list[Callable[[Path, Rows], str]] = [jsonl, json_list, delimited, tsv, parquet, arrow, arrow_file, hub]
every_format = pytest.mark.parametrize("write", FORMATS)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, "BUFFER", 10)


def loader_of(split: Any, tokenizer: Any, weights: Any = None) -> StreamLoader:
    return StreamLoader(
        encode(split.train, tokenizer, LENGTH).sequences,
        4,
        3,
        rows=split.rows,
        encode=lambda row: encode_record(row, tokenizer, LENGTH, "truncate"),
        source_weights=weights or {},
    )


def key(batch: Any) -> tuple[Any, ...]:
    return batch.input_ids.tolist(), batch.labels.tolist(), batch.epoch


def epoch_of(loader: StreamLoader) -> list[Any]:
    found = [next(loader)]
    while not loader.epoch.is_integer():
        found.append(next(loader))
    return found


@every_format
def test_a_stream_has_the_rows_that_reading_the_whole_data_gives(
    tmp_path: Path, write: Callable[[Path, Rows], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(tmp_path, ROWS)
    rows = list(open_stream([name], Request()).rows(Place()))
    assert [row.record.text for row in rows] == [row["text"] for row in ROWS]  # type: ignore[union-attr]
    if name != "hf:set":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        assert [row.record for row in rows] == list(read_records(name))
    for at, row in enumerate(rows):
        (again, *rest) = open_stream([name], Request()).rows(row.start)
        assert again == row and len(rest) == len(rows) - at - 1


@every_format
def test_a_state_gives_the_batches_that_would_have_come(
    tmp_path: Path, tiny_tokenizer: Any, write: Callable[[Path, Rows], str]
) -> None:
    name = write(tmp_path, ROWS)
    split = read_stream([name], None, 0.1, 0, Request())
    loader = loader_of(split, tiny_tokenizer)
    epoch = epoch_of(loader)
    assert sum(len(batch.input_ids) for batch in epoch) == len(split.train) == len(ROWS) - len(split.held_out)
    progress = [batch.epoch for batch in epoch]
    assert progress == sorted(progress) and progress[-1] == 1 and all(0 < one < 1 for one in progress[:-1])
    for taken in (0, 1, 4, 9, 12):
        loader = loader_of(split, tiny_tokenizer)
        for _ in range(taken):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = [key(batch) for batch in itertools.islice(loader, 14)]
        other = loader_of(read_stream([name], None, 0.1, 0, Request()), tiny_tokenizer)
        other.load_state(state)
        assert other.state() == state
        assert [key(batch) for batch in itertools.islice(other, 14)] == expected, taken


@every_format
def test_the_same_rows_are_held_out_and_weights_repeat_the_same_rows_as_for_json_lines(
    tmp_path: Path, tiny_tokenizer: Any, write: Callable[[Path, Rows], str]
) -> None:
    (tmp_path / "lines").mkdir()
    lines, name = jsonl(tmp_path / "lines", ROWS), write(tmp_path, ROWS)
    ours, theirs = (read_stream([one], None, 0.3, 1, Request()) for one in (name, lines))
    held = {content_key(record) for record in ours.held_out}
    assert held and held == {content_key(record) for record in theirs.held_out}
    label = str(open_stream([name], Request()).sources[0].content.label)
    whole = epoch_of(loader_of(ours, tiny_tokenizer))
    twice = epoch_of(loader_of(ours, tiny_tokenizer, {label: 2.0}))
    assert sum(len(batch.input_ids) for batch in twice) == 2 * sum(len(batch.input_ids) for batch in whole)


@every_format
def test_groups_stay_together(tmp_path: Path, write: Callable[[Path, Rows], str]) -> None:
    rows = [{"text": f"{number % 9} says {number}", "user": f"u{number % 9}"} for number in range(60)]
    split = read_stream([write(tmp_path, rows)], None, 0.4, 0, Request(group="user"))
    users = [{record.text.split()[0] for record in part} for part in (split.train, split.held_out)]  # type: ignore[union-attr]
    assert users[0] and users[1] and not users[0] & users[1]


BAD: list[tuple[Callable[[Path, Rows], str], str]] = [
    (jsonl, "a.jsonl:31"),
    (json_list, "a.json:92"),
    (parquet, "a.parquet:31"),
    (arrow, "a.arrow:31"),
    (arrow_file, "a.arrow:31"),
    (hub, "hf:set:train:31"),
]


@pytest.mark.parametrize(("write", "where"), BAD)
def test_an_invalid_row_after_the_first_part(
    tmp_path: Path,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, Rows], str],
    where: str,
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE_BYTES", 400)
    monkeypatch.setattr(streaming, "_LEAST_BYTES", 400)
    name = write(tmp_path, [*ROWS[:30], {"text": None}, *ROWS[30:]])
    loader = loader_of(read_stream([name], None, 0, 0, Request()), tiny_tokenizer)
    with pytest.raises(DataError) as caught:
        epoch_of(loader)
    assert str(caught.value.where).endswith(where) and caught.value.field == "on_bad_row"
    skipped = list[tuple[str, str]]()
    split = read_stream([name], None, 0, 0, Request(skip_bad_rows=True), lambda *found: skipped.append(found))
    assert 0 < len(split.train) < 30
    assert sum(len(batch.input_ids) for batch in epoch_of(loader_of(split, tiny_tokenizer))) == 40
    assert [at for at, _ in skipped] == [str(caught.value.where)]


@every_format
def test_data_that_changes_is_an_error(tmp_path: Path, tiny_tokenizer: Any, write: Callable[[Path, Rows], str]) -> None:
    name = write(tmp_path, ROWS)
    split = read_stream([name], None, 0, 0, Request())
    loader, digests = loader_of(split, tiny_tokenizer), split.digests()
    assert next(iter(digests.values())).startswith("partial:")
    assert digests == read_stream([name], None, 0, 0, Request()).digests()
    state = loader.state()
    write(tmp_path, ROWS[:39])
    if name != "hf:set":
        with pytest.raises(DataError, match="changed while it was in use"):
            next(loader)
    other = read_stream([name], None, 0, 0, Request())
    assert other.digests() != digests
    with pytest.raises(DataError, match="the data changed"):
        loader_of(other, tiny_tokenizer).load_state(state)
