"""Reading and encoding take a bounded amount of memory per byte of text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BOUND = 3.0
"""Bytes of process memory per byte of text, plus a constant."""

PEAK = """
import resource, sys
from transformers import PreTrainedTokenizerFast
from lorakit.data import Loader, encode, read_records, split
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
parted = split(read_records(sys.argv[2]), 0.05, 0)
train = encode(parted.train, tokenizer, 256)
loader = Loader(train.sequences, 4, 0)
next(loader), loader.state()
if parted.held_out:
    encode(parted.held_out, tokenizer, 256)
print(train.report.tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def _write(path: Path, size: int) -> Path:
    rng, have = random.Random(0), 0
    words = ["the", "quick", "brown", "fox", "jumps,", "over.", "lazy", "dogs", "and\n", "Wörter", "狐", "😀"]
    with path.open("w", encoding="utf-8") as file:
        while have < size:
            text = " ".join(rng.choice(words) for _ in range(30)) + f" {have}"
            turns = [{"role": "user", "content": text[:30]}, {"role": "assistant", "content": text[30:]}]
            line = text if path.suffix == ".txt" else json.dumps({"messages": turns}, ensure_ascii=False)
            have += file.write(line + "\n")
    return path


def _peak(tokenizer: Path, path: Path) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tokenizer), str(path)], capture_output=True, text=True, check=True
    )
    tokens, peak = done.stdout.split()
    return int(tokens), int(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource")
@pytest.mark.parametrize(("suffix", "megabytes"), [(".txt", (2, 14)), (".jsonl", (1, 6))])
def test_memory_per_byte_of_text(suffix: str, megabytes: tuple[int, int], tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    few, many = (_write(tmp_path / f"{size}{suffix}", size * 1_000_000) for size in megabytes)
    less, more = _peak(tmp_path / "tokenizer", few), _peak(tmp_path / "tokenizer", many)
    assert more[0] > 4 * less[0] > 0
    slope = (more[1] - less[1]) / (many.stat().st_size - few.stat().st_size)
    assert slope <= BOUND, slope


STREAM_PEAK = """
import resource, sys
from lorakit.data import Request
from lorakit.data.sources import Place
from lorakit.data.reading import open_stream
stream = open_stream([sys.argv[1]], Request())
size = sum(len(row.record.text) for row in stream.rows(Place()))
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_memory_of_a_stream_does_not_depend_on_its_size(suffix: str, tmp_path: Path) -> None:
    few, many = (_rows(tmp_path / f"{count}{suffix}", count) for count in (1_000, 60_000))
    found = [
        subprocess.run([sys.executable, "-c", STREAM_PEAK, str(path)], capture_output=True, text=True, check=True)
        for path in (few, many)
    ]
    (small, less), (large, more) = (map(int, done.stdout.split()) for done in found)
    assert large > 50 * small > 0
    assert more - less < 30_000_000


def _rows(path: Path, count: int) -> Path:
    """Write rows of 1,000 characters; a Parquet file has a single row group."""
    rows = [{"text": f"{number} " + "the quick brown fox\n" * 50} for number in range(count)]
    if path.suffix in (".parquet", ".arrow"):
        pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pyarrow.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            tables.write_table(table, path, use_dictionary=False, compression="none")
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=1000)
        return path
    with path.open("w", encoding="utf-8") as file:
        if path.suffix == ".csv":
            file.write("".join('"' + text + '"\n' for text in ["text", *(row["text"] for row in rows)]))
        elif path.suffix == ".json":
            json.dump(rows, file)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path
