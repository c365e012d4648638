"""Columns of class numbers have the names that `datasets` gives them, in tables read as a whole and in streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Request, read_records
from lorakit.data.reading import open_stream
from lorakit.data.sources import Place
from lorakit.errors import DataError

datasets = pytest.importorskip("datasets")

NAMES = ["O", "B-PER", "I-PER", "B-LOC"]


def save(path: Path, data: Any) -> str:
    if path.suffix == ".parquet":
        data.to_parquet(str(path))
    else:
        import pyarrow

        table = data.data.table
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def records(path: str, streamed: bool, skipped: list[str] | None = None) -> list[Any]:
    """Return the records; with a list, invalid rows are skipped, and the positions or notes are added to it."""
    request = Request(skip_bad_rows=skipped is not None)
    places = [] if skipped is None else skipped
    if streamed:
        stream = open_stream([path], request, lambda where, reason: places.append(f"{where}: {reason}"))
        return [row.record for row in stream.rows(Place())]
    found = read_records([path], request)
    places += found.notes
    return [*found]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_numbers_have_the_names_of_their_feature(
    order: list[str], suffix: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kind = datasets.ClassLabel(names=order)
    one = datasets.Features({"text": datasets.Value("string"), "label": kind})
    labels = [kind.str2int("B-LOC"), kind.str2int("O")]
    data = datasets.Dataset.from_dict({"text": ["a", "d"], "label": labels}, features=one)
    path = save(tmp_path / f"one.{suffix}", data)
    assert [row.label for row in records(path, streamed)] == ["B-LOC", "O"]
    words = datasets.List(datasets.Value("string"))
    for name, many in [("list", datasets.List(kind)), ("large", datasets.LargeList(kind))]:
        features = datasets.Features({"tokens": words, "ner_tags": many})
        tags = [[kind.str2int(name) for name in ("B-PER", "I-PER")], [kind.str2int("O")]]
        data = datasets.Dataset.from_dict({"tokens": [["x", "y"], ["z"]], "ner_tags": tags}, features=features)
        path = save(tmp_path / f"{name}.{suffix}", data)
        assert [row.tags for row in records(path, streamed)] == [("B-PER", "I-PER"), ("O",)]


@pytest.mark.parametrize(
    ("suffix", "streamed"),
    [("parquet", False), ("parquet", True), ("arrow", False), ("arrow", True), ("hub", False)],
)
@pytest.mark.parametrize("first", [True, False])
def test_rows_without_a_label_are_bad_rows(
    first: bool, suffix: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1 and null mark a row without a label in `datasets`, of a class, several classes, tags, and pairs of texts."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    kind, text = datasets.ClassLabel(names=NAMES), datasets.Value("string")
    labels = [-1, None, 2, 3, -1] if first else [2, -1, 3, None, 1]
    known = [at for at, label in enumerate(labels) if label is not None and label >= 0]
    many = [None if label is None else [label] for label in labels]
    columns: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"label": kind}, {"label": labels}),
        ({"label": datasets.List(kind)}, {"label": many}),
        ({"tags": datasets.List(kind)}, {"tags": many}),
        ({"text_pair": text, "label": kind}, {"text_pair": list("vwxyz"), "label": labels}),
        ({"text_pair": text, "score": datasets.Value("float64")}, {"text_pair": list("vwxyz"), "score": labels}),
    ]
    for number, (features, values) in enumerate(columns):
        words = {"tokens": [[letter] for letter in "abcde"]} if "tags" in values else {"text": list("abcde")}
        types = {"tokens": datasets.List(text)} if "tags" in values else {"text": text}
        data = datasets.Dataset.from_dict({**words, **values}, features=datasets.Features({**types, **features}))
        if suffix == "hub":
            (tmp_path / f"set{number}").mkdir()
            data.to_parquet(f"set{number}/train.parquet")
            path = f"hf:set{number}"
        else:
            path = save(tmp_path / f"{number}.{suffix}", data)
        good = [at for at, label in enumerate(labels) if label is not None] if "score" in values else known
        skipped: list[str] = []
        assert [row.line - 1 for row in records(path, streamed, skipped)] == good
        bad = next(at + 1 for at in range(5) if at not in good)
        assert any(f":{bad}: the field" in one or f"the first is row {bad}: the field" in one for one in skipped)
        with pytest.raises(DataError) as caught:
            records(path, streamed)
        assert str(caught.value.where).endswith(f":{bad}")
        assert f"'{[*values][-1]}'" in str(caught.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_pairs_of_which_some_lack_the_key(streamed: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"anchor": "a", "positive": "b", "score": 1}\n{"anchor": "c", "positive": "d"}\n')
    assert [row.line for row in records(str(path), streamed, [])] == [1]
    with pytest.raises(DataError) as caught:
        records(str(path), streamed)
    assert caught.value.where == f"{path}:2" and "'score'" in str(caught.value)
    path.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": "d"}\n')
    assert [row.label for row in records(str(path), streamed)] == [None, None]
