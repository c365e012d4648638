"""`make bench` runs every benchmark except the one that needs a GPU."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType

import pytest

from .loading import load

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def run_all() -> ModuleType:
    return load("benchmarks/run_all.py")


def test_every_benchmark_is_run(run_all: ModuleType) -> None:
    run = {shlex.split(command)[0] for command in run_all.COMMANDS.values()}
    assert {path.name for path in BENCHMARKS.glob("bench_*.py")} - {"bench_gpu.py"} <= run


def test_every_option_is_one_of_its_benchmark(run_all: ModuleType) -> None:
    for command in run_all.COMMANDS.values():
        script, *words = shlex.split(command)
        text = (BENCHMARKS / script).read_text()
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in text, command
