"""`metrics.jsonl`: one row per optimizer step and per evaluation, appended as they happen.

Knows the rows' fields and the file; `lorakit.report.runs` reads it back.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from lorakit import durable
from lorakit.errors import DiskError
from lorakit.report.runs import METRICS_FILE, read_metrics

TRAIN_FIELDS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "seconds",
    "tokens_per_second",
    "peak_rss_bytes",
)
EVAL_FIELDS = ("step", "eval_loss", "eval_perplexity", "eval_tokens")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsLog:
    """Appends whole lines to `metrics.jsonl`; a crash can only tear the last one, which readers drop.

    On a full disk rows wait in memory and are written with the next one that fits.

    Attributes:
        path: The file.
        waiting: Rows that have not been written, as lines.

    Raises:
        DiskError: The file cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as cause:
            raise DiskError(f"{self.path}: cannot be opened for writing ({cause.strerror}).") from cause
        self.waiting: list[bytes] = []

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write()
        finally:
            self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row.

        Args:
            row: Exactly the fields of `TRAIN_FIELDS` or `EVAL_FIELDS`, all finite.

        Raises:
            DiskError: The disk refuses, and not because it is full.
            ValueError: A value is NaN or infinite.
        """
        self.waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._write()

    def _write(self) -> None:
        whole, lines = os.fstat(self._file.fileno()).st_size, b"".join(self.waiting)
        try:
            written = self._file.write(lines)
            if written == len(lines):
                self.waiting.clear()
            else:
                self._file.truncate(whole)  # a part of a row must not be followed by another
        except OSError as cause:
            if cause.errno not in _FULL:
                raise DiskError(f"{self.path}: cannot be written ({cause.strerror}).") from cause

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint never knows of a row that a power cut takes away.

        Raises:
            DiskError: The disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as cause:
            raise DiskError(f"{self.path}: cannot be written ({cause.strerror}).") from cause


def cut(folder: Path, step: int, evaluated_step: int) -> int:
    """Drop the rows that a checkpoint does not know of, and a torn last line; they will come again.

    Args:
        folder: The run folder.
        step: The last step of the checkpoint; -1 drops all.
        evaluated_step: The last step that it knows an evaluation of; -1 for none.

    Returns:
        How many whole rows were dropped.

    Raises:
        DiskError: The disk refuses; the old file then still stands.
    """
    rows = read_metrics(folder).rows
    kept = [row for row in rows if row["step"] <= (evaluated_step if "eval_loss" in row else step)]
    durable.write_text(folder / METRICS_FILE, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    return len(rows) - len(kept)
