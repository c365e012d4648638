"""Columns of class numbers have the names that `datasets` gives them, in tables read as a whole and in streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Request, read_records
from lorakit.data.places import Place
from lorakit.data.row_stream import open_stream

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


def records(path: str, streamed: bool) -> list[Any]:
    return [row.record for row in open_stream([path], Request()).rows(Place())] if streamed else [*read_records([path])]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_numbers_have_the_names_of_their_feature(
    order: list[str], suffix: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kind = datasets.ClassLabel(names=order)
    one = datasets.Features({"text": datasets.Value("string"), "label": kind})
    labels = [kind.str2int("B-LOC"), -1, None, kind.str2int("O")]
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": labels}, features=one)
    path = save(tmp_path / f"one.{suffix}", data)
    assert [row.label for row in records(path, streamed)] == ["B-LOC", None, None, "O"]
    words = datasets.List(datasets.Value("string"))
    for name, many in [("list", datasets.List(kind)), ("large", datasets.LargeList(kind))]:
        features = datasets.Features({"tokens": words, "ner_tags": many})
        tags = [[kind.str2int(name) for name in ("B-PER", "I-PER")], [kind.str2int("O")]]
        data = datasets.Dataset.from_dict({"tokens": [["x", "y"], ["z"]], "ner_tags": tags}, features=features)
        path = save(tmp_path / f"{name}.{suffix}", data)
        assert [row.tags for row in records(path, streamed)] == [("B-PER", "I-PER"), ("O",)]
