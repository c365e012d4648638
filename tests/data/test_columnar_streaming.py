"""Streams of tables and Hub data sets: memory by row group, media, damaged files, slices and missing packages."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Request
from lorakit.data.reading import open_stream
from lorakit.data.sources import Place
from lorakit.data.streaming import read_stream
from lorakit.errors import DataError, MissingExtra, UsageError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
tables = pytest.importorskip("pyarrow.parquet")


def table(path: Path, count: int, **options: Any) -> str:
    tables.write_table(pyarrow.table({"text": [f"row {n}" for n in range(count)]}), path, **options)
    return str(path)


def test_only_the_row_groups_after_the_position_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = table(tmp_path / "a.parquet", 100, row_group_size=10)
    stream = open_stream([name], Request())
    asked = list[list[int]]()
    read = tables.ParquetFile.iter_batches

    def counted(self: Any, *rest: Any, row_groups: list[int], **more: Any) -> Any:
        asked.append(row_groups)
        return read(self, *rest, row_groups=row_groups, **more)

    monkeypatch.setattr(tables.ParquetFile, "iter_batches", counted)
    first, *_ = stream.rows(Place(0, 75, 76))
    assert (first.record.text, first.record.line) == ("row 75", 76)  # type: ignore[union-attr]
    assert [number for groups in asked for number in groups] == [7, 8, 9]


def test_columns_with_images_are_left_out(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    data = datasets.Dataset.from_dict({"text": ["a"], "picture": [None]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    stream = open_stream([str(tmp_path / "a.parquet")], Request())
    assert len(list(stream.rows(Place()))) == 1 and not stream.unused


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damaged_tables(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("not a table")
    with pytest.raises(DataError) as caught:
        open_stream([str(path)], Request())
    assert caught.value.where == str(path) and suffix.capitalize() in str(caught.value)


def test_a_table_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        open_stream([table(tmp_path / "a.parquet", 0)], Request())


def test_a_table_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(path, 3000, row_group_size=1000, compression="zstd")
    raw = bytearray(path.read_bytes())
    at = len(raw) // 2
    raw[at - 200 : at + 200] = bytes(400)
    path.write_bytes(raw)
    stream = open_stream([str(path)], Request())
    with pytest.raises(DataError) as caught:
        list(stream.rows(Place()))
    assert caught.value.where == str(path)


def test_hub_data_sets_that_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    table(tmp_path / "set" / "train.parquet", 5)
    with pytest.raises(UsageError) as caught:
        open_stream(["hf:set:train[:3]"], Request())
    assert caught.value.field == "streaming"
    with pytest.raises(DataError) as missing:
        open_stream(["hf:set:validation"], Request())
    assert missing.value.where == "hf:set:validation"
    assert len(list(open_stream(["hf:set:train+train"], Request()).rows(Place()))) == 10


def test_a_hub_data_set_of_known_size_has_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    table(tmp_path / "set" / "train.parquet", 50)
    stream = open_stream(["hf:set"], Request())
    assert stream.total_bytes == 0  # the number of rows is not in the data set's card
    card = "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 50\n    num_bytes: 900\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    stream = open_stream(["hf:set"], Request())
    assert 0 < stream.bytes_before(Place(0, 25, 26)) * 2 == pytest.approx(stream.total_bytes, abs=2)
    assert "unknown size" not in read_stream(["hf:set"], None, 0, 0, Request()).note


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return load(name, *rest)

    path = table(tmp_path / "a.parquet", 3)
    monkeypatch.setattr(builtins, "__import__", without)
    for name in (path, "hf:a/b"):
        with pytest.raises(MissingExtra, match=r"pip install 'lorakit\[data\]'"):
            open_stream([name], Request())
