"""Settings of a small run, and process groups."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .processes.processes import start


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


@pytest.fixture
def steady_run(short_run: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small run at a constant learning rate with evaluations, as plain JSON values."""
    plain = {**short_run, "data": [str(path) for path in short_run["data"]], "model": str(short_run["model"])}
    steady = {"lr_scheduler_type": "constant", "warmup_steps": 0, "tuning": False, "token_cache": False}
    return {**plain, **steady, "output_dir": str(short_run["output_dir"]), "eval_fraction": 0.2, "eval_steps": 2}


@pytest.fixture
def outcomes(tmp_path: Path) -> Callable[..., list[list[dict[str, Any]]]]:
    """Function that makes runs one after another in several processes, and returns the outcomes of each process."""

    def make(runs: list[dict[str, Any]], count: int = 2) -> list[list[dict[str, Any]]]:
        path = tmp_path / "runs.json"
        path.write_text(json.dumps(runs))
        start("process_runs", path, tmp_path, count=count)
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]

    return make


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group with one process."""
    from torch import distributed

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=60))
    try:
        yield
    finally:
        distributed.destroy_process_group()
