"""Tokens from the cache are those that encoding gives; damaged entries are made again, and old ones are removed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Loader, Records, encode, lengths, read_records, token_cache
from lorakit.data.token_cache import TokenCache
from lorakit.durable import SEAL, sealed
from lorakit.tasks import EncodeOptions, Target, causal_lm

INPUTS = dict.fromkeys(("reading", "tokenizer", "template", "code"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": f"what is {n}?", "completion": f"{n} of course " * (1 + n % 5)} for n in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1)
    return []


def cached(cache: TokenCache, records: Any, tokenizer: Any, length: int, *, overlong: Any = "truncate") -> Any:
    options = EncodeOptions(length, overlong, cache=cache)
    return causal_lm.CAUSAL_LM.encode(records, tokenizer, Target(), options)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_the_second_result_is_the_same_and_does_not_tokenize(
    rows: Path, tmp_path: Path, said: list[str], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, overlong: Any
) -> None:
    cache = TokenCache(tmp_path / "cache", {**INPUTS, "tokenizer": "x"}, said.append)
    plain = encode(read_records(rows), tiny_tokenizer, 12, overlong=overlong)
    first = cached(cache, read_records(rows), tiny_tokenizer, 12, overlong=overlong)
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr(causal_lm, "encode_text", None)
    second = cached(cache, read_records(rows), tiny_tokenizer, 12, overlong=overlong)
    for found in (first, second):
        assert found.report == plain.report and found.sources == plain.sources
        assert list(found.record_of) == list(plain.record_of)
        assert list(found.sequences) == list(plain.sequences) and lengths(found.sequences) == lengths(plain.sequences)
        assert found.sequences.tokens == plain.report.tokens
        assert found.sequences.trained_tokens == plain.report.trained_tokens
    ours, theirs = Loader(second.sequences, 4, 0), Loader(plain.sequences, 4, 0)
    assert ours.state() == theirs.state()
    assert next(ours).input_ids.tolist() == next(theirs).input_ids.tolist()
    assert said == []


def test_a_cache_that_can_only_be_read_is_used(
    rows: Path, tmp_path: Path, said: list[str], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    cache = TokenCache(tmp_path / "cache", INPUTS, said.append)
    first = cached(cache, read_records(rows), tiny_tokenizer, 60)
    monkeypatch.setattr(os, "utime", read_only)
    monkeypatch.setattr(causal_lm, "encode_text", None)
    assert cached(cache, read_records(rows), tiny_tokenizer, 60).report == first.report
    assert said == []


def test_anything_else_is_another_entry(rows: Path, tmp_path: Path, said: list[str], tiny_tokenizer: Any) -> None:
    folder = tmp_path / "cache"
    cached(TokenCache(folder, {**INPUTS, "tokenizer": "x"}, said.append), read_records(rows), tiny_tokenizer, 60)
    cached(TokenCache(folder, {**INPUTS, "tokenizer": "y"}, said.append), read_records(rows), tiny_tokenizer, 60)
    cache = TokenCache(folder, {**INPUTS, "tokenizer": "x"}, said.append)
    cached(cache, read_records(rows), tiny_tokenizer, 13)
    cached(cache, read_records(rows), tiny_tokenizer, 60, overlong="drop")
    cached(cache, read_records(rows).some(range(20)), tiny_tokenizer, 60)
    cached(cache, read_records([rows, rows]), tiny_tokenizer, 60)
    assert len(entries(tmp_path)) == 6
    with rows.open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    assert cached(cache, read_records(rows), tiny_tokenizer, 60).report.completions == 51
    assert len(entries(tmp_path)) == 7
    cached(cache, Records(read_records(rows)), tiny_tokenizer, 60)  # in memory
    assert len(entries(tmp_path)) == 7 and said == []


@pytest.mark.parametrize("name", ["ids", "trained", "ends", "manifest.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_entry_is_made_again(
    rows: Path, tmp_path: Path, said: list[str], tiny_tokenizer: Any, name: str, how: str
) -> None:
    cache = TokenCache(tmp_path / "cache", INPUTS, said.append)
    first = cached(cache, read_records(rows), tiny_tokenizer, 12)
    (entry,) = entries(tmp_path)
    raw = (entry / name).read_bytes()
    if how == "missing":
        (entry / name).unlink()
    else:
        (entry / name).write_bytes(raw[:-9] if how == "cut" else raw[:40] + bytes([raw[40] ^ 1]) + raw[41:])
    again = cached(cache, read_records(rows), tiny_tokenizer, 12)
    assert list(again.sequences) == list(first.sequences) and again.report == first.report
    assert len(said) == 1 and str(entry) in said[0]
    assert (entry / name).read_bytes() == raw
    cached(cache, read_records(rows), tiny_tokenizer, 12)
    assert len(said) == 1


@pytest.mark.parametrize("field", ["files", "values"])
@pytest.mark.parametrize("value", [[], None, "text", {"ids": 1}])
def test_a_manifest_with_values_of_other_types_is_a_miss(
    rows: Path, tmp_path: Path, said: list[str], tiny_tokenizer: Any, field: str, value: Any
) -> None:
    cache = TokenCache(tmp_path / "cache", INPUTS, said.append)
    first = cached(cache, read_records(rows), tiny_tokenizer, 12)
    path = entries(tmp_path)[0] / "manifest.json"
    manifest = {name: part for name, part in json.loads(path.read_text()).items() if name != SEAL}
    path.write_text(json.dumps(sealed({**manifest, field: value})))
    assert list(cached(cache, read_records(rows), tiny_tokenizer, 12).sequences) == list(first.sequences)
    assert len(said) == 1 and str(path.parent) in said[0]


def test_the_entries_unused_for_longest_are_removed(
    rows: Path, tmp_path: Path, said: list[str], tiny_tokenizer: Any
) -> None:
    folder = tmp_path / "cache"
    cached(TokenCache(folder, INPUTS, said.append), read_records(rows), tiny_tokenizer, 12)
    size = sum(file.stat().st_size for file in entries(tmp_path)[0].iterdir())
    cache = TokenCache(folder, INPUTS, said.append, most_bytes=5 * size // 2)
    (oldest,) = entries(tmp_path)
    cached(cache, read_records(rows), tiny_tokenizer, 13)
    (used,) = set(entries(tmp_path)) - {oldest}
    os.utime(oldest, (1, 1))
    os.utime(used, (2, 2))
    cached(cache, read_records(rows), tiny_tokenizer, 12)  # uses the oldest
    leftover = folder / ".lorakit-tmp-00-x"
    leftover.mkdir()
    os.utime(leftover, (1, 1))
    cached(cache, read_records(rows), tiny_tokenizer, 14)
    assert oldest in entries(tmp_path) and used not in entries(tmp_path) and leftover not in entries(tmp_path)
    assert len(entries(tmp_path)) == 2 and said == []


def test_small_data_and_a_cache_that_cannot_be_written(
    rows: Path, tmp_path: Path, said: list[str], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    cache = TokenCache(tmp_path / "file", INPUTS, said.append)
    assert cached(cache, read_records(rows), tiny_tokenizer, 12).report.completions == 50
    assert len(said) == 1
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1 << 20)
    cached(TokenCache(tmp_path / "cache", INPUTS, said.append), read_records(rows), tiny_tokenizer, 12)
    assert entries(tmp_path) == [] and len(said) == 1
