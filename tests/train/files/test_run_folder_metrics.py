"""Rows are appended completely, and those after a checkpoint are removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DiskError
from lorakit.report import read_metrics
from lorakit.train.files.run_folder import MetricsLog, cut_metrics


def _rows(folder: Path) -> None:
    with MetricsLog(folder) as log:
        log.append({"step": 0, "eval_loss": 2.0})
        for step in (1, 2, 3):
            log.append({"step": step, "loss": 1.0 / step})
        log.append({"step": 2, "eval_loss": 1.5})
        log.append({"step": 3, "eval_loss": 1.2})
        log.sync()


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    _rows(tmp_path)
    metrics = read_metrics(tmp_path)
    assert [row["step"] for row in metrics.train] == [1, 2, 3]
    assert [row["eval_loss"] for row in metrics.evaluations] == [2.0, 1.5, 1.2]


def test_a_second_log_appends(tmp_path: Path) -> None:
    _rows(tmp_path)
    with MetricsLog(tmp_path) as log:
        log.append({"step": 4, "loss": 0.1})
    assert [row["step"] for row in read_metrics(tmp_path).train] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("step", "evaluated", "train", "evals"),
    [(2, 2, [1, 2], [0, 2]), (3, 2, [1, 2, 3], [0, 2]), (-1, -1, [], []), (3, 3, [1, 2, 3], [0, 2, 3])],
)
def test_cut_drops_what_the_checkpoint_does_not_know(
    tmp_path: Path, step: int, evaluated: int, train: list[int], evals: list[int]
) -> None:
    _rows(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo')  # truncated by a crash
    cut_metrics(tmp_path, step, evaluated)
    metrics = read_metrics(tmp_path)
    assert [row["step"] for row in metrics.train] == train
    assert [row["step"] for row in metrics.evaluations] == evals
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == len(metrics.rows)


def test_a_row_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="JSON compliant"):
        log.append({"step": 1, "loss": float("nan")})
    assert read_metrics(tmp_path).rows == ()


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written"):
        MetricsLog(tmp_path)


def test_rows_are_one_json_object_a_line(tmp_path: Path) -> None:
    _rows(tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert isinstance(json.loads(line), dict)


class _Full:
    """A file on a disk with `room` free bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if data and not self.room:
            raise OSError(28, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        return int(self.file.write(part))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_rows_wait_while_the_disk_is_full_and_none_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(path: Path, mode: str = "r", **options: Any) -> Any:
        file = opened(path, mode, **options)
        if mode != "ab":
            return file
        disks.append(_Full(file, 100))
        return disks[-1]

    opened, disks = Path.open, list[_Full]()
    monkeypatch.setattr(Path, "open", open_full)
    rows = [{"step": step, "eval_loss": 1.0, "eval_perplexity": 2.0, "eval_tokens": 3} for step in range(6)]
    with MetricsLog(tmp_path) as log:
        (full,) = disks
        for row in rows[:3]:
            log.append(row)
        assert len(log.waiting) == 2
        assert list(read_metrics(tmp_path).rows) == rows[:1]
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
        full.room = 30  # again only a part of a row fits
        log.append(rows[3])
        assert list(read_metrics(tmp_path).rows) == rows[:1]
        full.room = 10_000
        log.append(rows[4])
        assert log.waiting == []
        assert list(read_metrics(tmp_path).rows) == rows[:5]
        full.room = 0
        log.append(rows[5])
        full.room = 10_000
    assert list(read_metrics(tmp_path).rows) == rows
