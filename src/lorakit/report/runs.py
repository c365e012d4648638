"""Reads run folders: `metrics.jsonl` and `run.json`. The files are the contract; nothing of training is needed.

A last line that a crash has torn is dropped; any other bad line is an error with its number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit import durable
from lorakit.errors import AdapterFileError, RunError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Metrics:
    """The rows of a run in the order in which they were written.

    Attributes:
        rows: All rows.
    """

    rows: tuple[dict[str, Any], ...]

    @property
    def train(self) -> list[dict[str, Any]]:
        """One row per optimizer step: step, epoch, loss, learning_rate, grad_norm, tokens, ..."""
        return [row for row in self.rows if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One row per evaluation: step, eval_loss, eval_perplexity, eval_tokens."""
        return [row for row in self.rows if "eval_loss" in row]


def read_metrics(folder: str | Path) -> Metrics:
    """Read `metrics.jsonl` of a run.

    Args:
        folder: The run folder.

    Returns:
        Its rows; none where the file is missing.

    Raises:
        RunError: A line other than a torn last one is no row; the message gives its number.
    """
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Metrics(())
    except OSError as cause:
        raise RunError(f"{path}: cannot be read ({cause.strerror}).") from cause
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and isinstance(row.get("step"), int)
        except ValueError:
            whole = False
        if not whole:
            raise RunError(f"{path}, line {number}: not a row of metrics.")
        rows.append(row)
    return Metrics(tuple(rows))


def read_run(folder: str | Path) -> dict[str, Any]:
    """Read `run.json` of a run.

    Args:
        folder: The run folder.

    Returns:
        Its content.

    Raises:
        RunError: The folder holds no run, or its record is damaged.
    """
    path = Path(folder) / RUN_FILE
    try:
        record = durable.read_json(path, 4 << 20)
    except AdapterFileError as cause:
        raise RunError(f"{folder}: holds no run that can be read. {cause}") from None
    if not isinstance(record, dict):
        raise RunError(f"{path}: not the record of a run.")
    return record
