"""`lorakit train` on bad input: an error with location and remedy before weights are loaded; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli
from lorakit.train.setup import prepare

Fails = Callable[..., str]
Train = Callable[..., int]

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde"
TEXT = '{"text": "the quick brown fox"}\n'


@pytest.fixture
def train(tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the command on some data."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)

    def call(data: object, *more: str, model: object = tiny_model_directory) -> int:
        words = ["train", "--model", model, "--data", data, "--output-dir", tmp_path / "run"]
        flags = ["--device", "cpu", "--dtype", "float32", "--eval-fraction", "0", "--r", "2", "--max-steps", "1"]
        return cli.main([*map(str, words), *flags, "--max-length", "32", *more])

    return call


@pytest.fixture
def fails(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run the command, which must fail with a message before weights are loaded, and return the message."""

    def no_weights(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    def call(data: object, *more: str, **options: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert train(data, *more, **options) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "unexpected" not in said
        assert sorted(tmp_path.rglob("*")) == before
        return said.replace(f"{tmp_path}/", "")

    monkeypatch.setattr(prepare, "load_model_for", no_weights)
    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


Write = Callable[[str, "str | bytes"], Path]


def test_an_unknown_column(fails: Fails, write: Write) -> None:
    path = write("a.jsonl", TEXT)
    said = fails(path, "--columns", "text=body")
    assert "'body'" in said and "'text'" in said and path.name in said


def test_rows_of_two_shapes(fails: Fails, write: Write) -> None:
    path = write("a.jsonl", TEXT + '{"prompt": "a", "completion": "b"}\n')
    said = fails(path)
    assert f"{path.name}:2" in said and "'text'" in said and "'prompt'" in said


@pytest.mark.parametrize(
    "content", [b"PAR1 not a table", b"", b"PAR1" + b"\0" * 50 + b"PAR1"], ids=["short", "empty", "zeros"]
)
def test_a_damaged_parquet_file(
    fails: Fails,
    write: Write,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    path = write("a.parquet", content)
    said = fails(path)
    assert path.name in said and ("Parquet" in said or "empty" in said)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_a_hub_data_set_without_a_network(
    fails: Fails, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    said = fails("hf:owner/rows")
    assert "hf:owner/rows" in said and f"{name} is set" in said


def test_a_hub_model_without_a_network(fails: Fails, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = fails(write("a.jsonl", TEXT), model="owner/model")
    assert "owner/model" in said and "HF_HUB_OFFLINE is set" in said


def test_an_image(fails: Fails, write: Write) -> None:
    assert "'.png'" in fails(write("a.png", PNG))
    for name in ("b.jsonl", "b.txt", "b.csv", "b.json"):
        path = write(name, PNG)
        said = fails(path)
        assert path.name in said and "PNG image" in said


def test_an_image_in_a_row(fails: Fails, write: Write) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is this?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    path = write("a.jsonl", json.dumps({"messages": turns}) + "\n")
    said = fails(path)
    assert f"{path.name}:1" in said and "content" in said


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content }}{{ 1 / 0 }}", "{% for %}"]
)
def test_a_chat_template_that_fails(fails: Fails, write: Write, template: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write("a.jsonl", json.dumps({"messages": turns}) + "\n")
    said = fails(path, "--chat-template", str(write("t.jinja", template)))
    assert "template" in said and (f"{path.name}:1" in said or "t.jinja" in said)


@pytest.mark.parametrize("megabytes", [0.1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_row_of_ten_megabytes(megabytes: float, fails: Fails, write: Write) -> None:
    path = write("a.jsonl", json.dumps({"prompt": "a b " * int(megabytes * 250_000), "completion": "c"}) + "\n")
    said = fails(path)  # nothing is left of the completion
    assert path.name in said and "No token in the data contributes to the loss" in said and "--max-length" in said
    said = fails(path, "--overlong", "error")
    assert f"{path.name}:1" in said and "max_length is 32" in said and "--overlong" in said


def test_null_bytes(fails: Fails, write: Write) -> None:
    path = write("a.jsonl", TEXT + '{"text": "a\0b"}\n')
    said = fails(path)
    assert path.name in said and f"offset {len(TEXT) + 11}" in said


def test_lone_surrogates(fails: Fails, write: Write) -> None:
    path = write("a.jsonl", TEXT + '{"text": "a\\ud800b"}\n')
    said = fails(path)
    assert f"{path.name}:2" in said and "surrogate" in said


@pytest.mark.axes(alone=("name", "end", "begin"))
@pytest.mark.parametrize("begin", [b"\xef\xbb\xbf", b""], ids=["byte order mark", "none"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_byte_order_marks_and_line_ends_do_not_matter(
    begin: bytes, end: bytes, name: str, train: Train, write: Write, tmp_path: Path
) -> None:
    rows = {
        "a.jsonl": [b'{"question": "one?", "answer": "two"}'] * 2,
        "a.json": [b'[{"question": "one?", "answer": "two"},', b'{"question": "one?", "answer": "two"}]'],
        "a.csv": [b"question,answer", b"one?,two", b"one?,two"],
        "a.tsv": [b"question\tanswer", b"one?\ttwo", b"one?\ttwo"],
    }[name]
    assert train(write(name, begin + end.join(rows) + end)) == 0
    report = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"question": "one?", "answer": "two"}\n' * 2)
    assert train(plain, "--overwrite") == 0
    expected = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert {**report, "notes": None} == {**expected, "notes": None}


def test_utf_16(fails: Fails, write: Write) -> None:
    assert "UTF-16" in fails(write("a.jsonl", TEXT.encode("utf-16")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"], ids=["empty", "blank", "byte order mark"])
def test_an_empty_file(fails: Fails, write: Write, name: str, content: bytes) -> None:
    path = write(name, content)
    said = fails(path)
    assert path.name in said and ("empty" in said or "no rows" in said)


def test_a_million_empty_rows(fails: Fails, write: Write) -> None:
    path = write("blank.jsonl", b"\n" * 1_000_000)
    assert "empty" in fails(path)


@pytest.mark.slow
def test_a_million_rows_of_empty_text(fails: Fails, write: Write) -> None:
    path = write("a.jsonl", b'{"text": ""}\n' * 1_000_000)
    said = fails(path)
    assert path.name in said and "empty" in said


def test_rows_of_empty_text(fails: Fails, write: Write) -> None:
    path = write("a.jsonl", b'{"text": ""}\n' * 3)
    said = fails(path)
    assert path.name in said and "empty" in said


def test_a_directory_without_data(fails: Fails, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    said = fails(folder)
    assert "data: " in said and ".jsonl" in said
