"""Reading run directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import RunError
from lorakit.report import read_metrics


def test_a_torn_last_line_is_dropped_and_any_other_bad_line_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert read_metrics(tmp_path).rows == ({"step": 1, "loss": 2.0},)
    for bad in ("nonsense", "[1]", '{"loss": 1}'):
        path.write_text(f'{{"step": 1, "loss": 2.0}}\n{bad}\n', encoding="utf-8")
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: not a metrics row"):
            read_metrics(tmp_path)


def test_a_folder_without_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "nowhere").rows == ()
