"""Rows of JSON, CSV, TSV, Parquet and Arrow files, and the names of sources."""

from __future__ import annotations

import builtins
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Completion, Conversation, Request, read_records
from lorakit.data.sources import HubSource, expand
from lorakit.errors import DataError, MissingExtra

ROWS = [{"prompt": 'é\u2028, "x"\n;', "completion": "NA"}, {"prompt": "007", "completion": " b "}]


def pairs(path: object, request: Request | None = None) -> list[tuple[str, str, int | None]]:
    found = list(read_records(path, request))  # type: ignore[arg-type]
    assert all(isinstance(row, Completion) for row in found)
    return [(row.prompt, row.completion, row.line) for row in found if isinstance(row, Completion)]


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_records(path)
    return str(error.value)


@pytest.mark.parametrize("start", ["", "\ufeff", " \n"])
def test_json_lists(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(start + json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = 2 + start.count("\n"), 6 + start.count("\n")
    assert pairs(path) == [(ROWS[0]["prompt"], "NA", lines[0]), ("007", " b ", lines[1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))  # JSON Lines under another suffix
    assert [row[1:] for row in pairs(path)] == [("NA", 1), (" b ", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the data file has no rows"),
        ('[{"text": "a"},]', "a.json:1: not valid JSON"),
        ('[{"text": "a"}', "a.json:1: not valid JSON"),
        ('[{"text": "a"}] x', "a.json:1: not valid JSON"),
        ('[{"text": "a"}\n{"text": "b"}]', "a.json:1: not valid JSON"),
        ('[{"text": "a"},\n {"text": "a", "text": "b"}]', "a.json:2: not valid JSON (duplicate key 'text')"),
        ('{\n "rows": [{"text": "a"}]\n}', "the file is a single object; write its list 'rows' to a file"),
        ("[1]", "a.json:1: a row must be a JSON object, not the number 1"),
    ],
)
def test_invalid_json(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path / "a.json", text)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", "\t")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_values_are_strings_exactly_as_written(tmp_path: Path, suffix: str, delimiter: str, encoding: str) -> None:
    path = tmp_path / f"a{suffix}"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert pairs(path) == [(ROWS[0]["prompt"], "NA", 2), ("007", " b ", 4)]


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    path, before = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text("prompt,completion\n" + "x" * 200_000 + ",y\n")
    assert len(pairs(path)[0][0]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,a\n1,2\n", "a.csv:1: the first row must contain a distinct name for each column, not 'a', 'a'"),
        ("prompt,\n1,2\n", "a.csv:1: the first row must contain a distinct name"),
        ("prompt,completion\na,b\n1\n", "a.csv:3: the row has 1 cell, but there are 2 columns"),
        ('prompt,completion\n"open,4\nx,y\n', "a.csv:2: not valid CSV (unexpected end of data)"),
        ("prompt,completion\n", "the data file has no rows"),
        ("foo,bar\n1,2\n", "a.csv:2: the columns 'foo', 'bar' are not recognized"),
    ],
)
def test_invalid_csv(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path / "a.csv", text)


def test_empty_rows_of_a_csv_are_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from lorakit.data import encode

    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\n" + ",\n" * 1000)
    assert encode(read_records(path), tiny_tokenizer, 16).report.empty_rows == 1000


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [*ROWS, {"prompt": None, "completion": "c"}]
    path = tmp_path / f"a{suffix}"
    data = datasets.Dataset.from_list(rows)
    if suffix == ".parquet":
        data.to_parquet(str(path))
    else:
        data.save_to_disk(str(tmp_path / "saved"))
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    with pytest.raises(DataError, match=rf"a{suffix}:3: the field 'prompt' is null"):
        read_records(path)
    assert pairs(path, Request(skip_bad_rows=True)) == [(ROWS[0]["prompt"], "NA", 1), ("007", " b ", 2)]


def test_the_mark_of_tokens_without_a_tag_is_not_a_tag(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"tokens": ["a"], "tags": [tag]}) + "\n" for tag in (1, -100)))
    with pytest.raises(DataError, match=r"a.jsonl:2: the field 'tags' contains -100"):
        read_records(path)
    assert [record.line for record in read_records(path, Request(skip_bad_rows=True))] == [1]


def test_a_damaged_table_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    assert "not a valid Parquet file" in refused(path, "no")
    load = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'lorakit\[data\]'"):
        read_records(path)


def test_tool_calls_of_a_table_have_no_empty_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table gives every message the fields of all others, with null where they were missing."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"messages": talk}]).to_parquet(str(path))
    (found,) = read_records(path)
    assert isinstance(found, Conversation)
    assert dict(found.messages[0].fields) == {}
    assert found.messages[1].fields["tool_calls"][0]["function"]["arguments"] == {"a": 1}  # type: ignore[index,call-overload]


def test_names_of_sources(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.txt", "deep/c.csv", "notes.pdf", ".hidden.txt", "state.json"):
        (tmp_path / name).write_text("x")
    assert expand([tmp_path]) == [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "deep" / "c.csv"]
    assert expand([str(tmp_path / "*.jsonl")]) == [tmp_path / "b.jsonl"]
    assert expand(["hf:owner/name"]) == [HubSource("owner/name")]
    assert expand(["hf:owner/name:test[:10]@v1#en"]) == [HubSource("owner/name", "test[:10]", "v1", "en")]
    assert str(expand(["hf:owner/name:test@v1#en"])[0]) == "hf:owner/name:test@v1#en"
    with pytest.raises(DataError, match="not the name of a Hub data set"):
        expand(["hf:a/b/c"])


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*names: str, **options: str) -> Any:
        asked.append((names, options))
        if names[0] == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("it does not exist\nmore")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row[2] for row in pairs("hf:owner/name:test@v1#en")] == [1, 2]
    assert asked == [(("owner/name", "en"), {"split": "test", "revision": "v1"})]
    with pytest.raises(DataError, match=r"hf:no/such:train: .*no such data set on the Hub \(it does not exist more\)"):
        read_records("hf:no/such")


def test_a_missing_file_that_looks_like_a_hub_name_says_how_to_name_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="For a data set on the Hub, write hf:owner/name"):
        read_records("owner/name")
