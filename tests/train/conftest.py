"""Settings of a small run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def short_run(tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run of a few steps on five short texts into `tmp_path / "run"`, without plots."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    texts = [tmp_path / f"{number}.txt" for number in range(5)]
    for number, path in enumerate(texts):
        path.write_text(f"The quick fox number {number} jumps over {number + 3} lazy dogs. " * 3, encoding="utf-8")
    return {
        "model": tiny_model_directory,
        "data": texts,
        "output_dir": tmp_path / "run",
        "max_length": 24,
        "dtype": "float32",
        "device": "cpu",
        "r": 2,
    }
