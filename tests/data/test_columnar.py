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
from lorakit.data.reading import open_stream
from lorakit.data.sources import Place
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


BYTES = [
    b"one",
    "zwölf".encode(),
    b"caf\xe9",
    b"",
    b"\xed\xa0\x80",
    b"\xff\xfe",
    "日本".encode(),
    b"cut \xe6\x97",
    b"end",
]


def is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def as_strings(kind: str) -> Any:
    """Return the bytes as an array of strings, which pyarrow does not check."""
    plain = pyarrow.array(BYTES, pyarrow.binary()).view(pyarrow.string())
    if kind == "list":
        return pyarrow.ListArray.from_arrays(list(range(len(BYTES) + 1)), plain)
    if kind == "struct":
        return pyarrow.StructArray.from_arrays([plain], ["inner"])
    wide = pyarrow.array(BYTES, pyarrow.large_binary()).view(pyarrow.large_string())
    return {"string": plain, "large": wide, "dictionary": plain.dictionary_encode()}[kind]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "hub"])
@pytest.mark.parametrize("kind", ["string", "large", "list", "struct", "dictionary"])
def test_strings_that_are_not_text_are_bad_rows(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `bytes.decode`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / f"train.{suffix if suffix != 'hub' else 'parquet'}"
    bad = [at for at, value in enumerate(BYTES, start=1) if not is_text(value)]
    columns = {"text": [f"row {at}" for at in range(1, 10)], "other": as_strings(kind)}
    if kind == "string":
        columns = {"text": columns["other"], "other": columns["text"]}
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        tables.write_table(table, path, row_group_size=4)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    name = "hf:set" if suffix == "hub" else str(path)
    found = read_records(name, Request(skip_bad_rows=True))
    wanted = [(at, BYTES[at - 1].decode() if kind == "string" else f"row {at}") for at in range(1, 10) if at not in bad]
    assert [(record.line, record.text) for record in found] == wanted  # type: ignore[union-attr]
    assert [(found[at].line, found[at].text) for at in (3, 0, 4)] == [wanted[at] for at in (3, 0, 4)]  # type: ignore[union-attr]
    column = "text" if kind == "string" else "other"
    assert any(f"4 rows skipped; the first is row 3: the field '{column}'" in note for note in found.notes)
    with pytest.raises(DataError) as caught:
        read_records(name)
    assert str(caught.value.where).endswith(":3") and "UTF-8 (byte 0xe9)" in str(caught.value)
    places: list[str] = []
    stream = open_stream([name], Request(skip_bad_rows=True), lambda where, _: places.append(where))
    assert [row.record.text for row in stream.rows(Place())] == [text for _, text in wanted]  # type: ignore[union-attr]
    assert places == [f"{'hf:set:train' if suffix == 'hub' else path}:{at}" for at in bad]
