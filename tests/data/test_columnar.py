"""Tables from files: the rows and the hash are those of the file now, whatever an earlier one had; oracle: pyarrow."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Request, read_records
from lorakit.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
tables = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")


def write(path: Path, texts: list[Any], **options: Any) -> Path:
    table = pyarrow.table({"text": texts})
    if path.suffix == ".parquet":
        tables.write_table(table, path, **options)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=options.get("row_group_size"))
    return path


def texts(name: str | Path) -> list[str]:
    return [record.text for record in read_records(name)]  # type: ignore[union-attr]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_other_rows_under_the_same_name_size_and_time(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{suffix}", ["one", "two"])
    before = path.stat()
    assert texts(path) == ["one", "two"]
    time.sleep(0.02)  # longer than a tick of the file system's clock
    write(path, ["six", "ten"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert texts(path) == ["six", "ten"]
    assert read_records(path).digests() == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}


def test_other_rows_in_a_directory_that_is_named_as_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set" / "train.parquet", ["one", "two"])
    before = path.stat()
    first = read_records("hf:set")
    assert [record.text for record in first] == ["one", "two"]  # type: ignore[union-attr]
    write(path, ["six", "ten"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts("hf:set") == ["six", "ten"]
    assert [record.text for record in first] == ["one", "two"]  # type: ignore[union-attr] # still mapped


def test_a_table_that_changes_in_use_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["one", "two"])
    before, records = path.stat(), read_records(path)
    time.sleep(0.02)
    write(path, ["six", "ten"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for use in (list, lambda one: one.digests()):
        with pytest.raises(DataError, match="changed while it was in use") as caught:
            use(records)
        assert caught.value.where == str(path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rows_in_any_order_are_those_of_the_file(suffix: str, tmp_path: Path) -> None:
    wanted = [None if number % 7 == 3 else f"row {number}" for number in range(1000)]
    path = write(tmp_path / f"a.{suffix}", wanted, row_group_size=300)
    records = read_records(path, Request(skip_bad_rows=True))
    kept = [(row, text) for row, text in enumerate(wanted, start=1) if text is not None]
    assert [(record.line, record.text) for record in records] == kept  # type: ignore[union-attr]
    for index in random.Random(0).sample(range(len(kept)), 20):
        assert (records[index].line, records[index].text) == kept[index]  # type: ignore[union-attr]
    assert [record.line for record in records[700:2:-130]] == [row for row, _ in kept[700:2:-130]]
    part = records.some(range(5, len(kept), 50))
    assert [record.line for record in part] == [row for row, _ in kept[5::50]]
