"""Imports at start-up: nothing heavy is loaded early. benchmarks/bench_startup.py measures the time."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.cli import COMMANDS
from lorakit.startup import RARELY, SPIN_VARIABLE, SPINS, WAITING, rare_collections

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "gguf", "safetensors", "huggingface_hub"}
SHOW = "import sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages in a new interpreter after running the code."""
    run = subprocess.run([sys.executable, "-c", f"{code}\n{SHOW}"], capture_output=True, text=True, check=True)
    return set(json.loads(run.stderr.splitlines()[-1]))


def test_the_probe_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_by("import numpy")


@pytest.mark.parametrize("module", ["lorakit", "lorakit.errors", "lorakit.config", "lorakit.targets", "lorakit.plan"])
def test_the_lower_floors_load_no_third_party_package(module: str) -> None:
    assert not loaded_by(f"import {module}") & (HEAVY | {"cyclopts", "pydantic", "rich", "yaml"})


def test_a_light_public_name_loads_no_torch() -> None:
    assert not loaded_by("from lorakit import LoraConfig, TaskType, LorakitError, estimate") & HEAVY


@pytest.mark.parametrize(
    "words",
    [
        *([], ["--help"], ["--version"], ["train", "--help-all"], ["adapters", "add", "--help"]),
        *([command, "--help"] for command in COMMANDS),
    ],
)
def test_help_loads_no_torch(words: list[str]) -> None:
    found = loaded_by(f"from lorakit.cli import main; assert main({words}) == 0")
    assert not found & HEAVY


def test_wrong_usage_of_train_is_reported_before_plan_yaml_and_torch_are_loaded(tmp_path: Path) -> None:
    words = ["train", "--model", "smollm2", "--data", str(tmp_path / "none.txt"), "--output-dir", str(tmp_path / "run")]
    code = f"from lorakit.cli import main; assert main({words}) == 1; assert 'lorakit.plan' not in sys.modules"
    assert not loaded_by(f"import sys; {code}") & (HEAVY | {"yaml"})


@pytest.mark.costly
@pytest.mark.parametrize("theirs", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"KMP_BLOCKTIME": "0"}])
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(theirs: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | theirs
    words = [sys.executable, "-m", "lorakit", "doctor", "--quick", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert json.loads(done.stdout)["waiting"] == (theirs or {SPIN_VARIABLE: str(SPINS)})


@pytest.fixture
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield (700, 10, 10)
    gc.set_threshold(*before)


def test_collections_are_rare_within_the_block_and_as_before_after_it(thresholds: tuple[int, int, int]) -> None:
    with rare_collections():
        assert gc.get_threshold() == RARELY
        with rare_collections():
            assert gc.get_threshold() == RARELY
        assert gc.get_threshold() == RARELY
    assert gc.get_threshold() == thresholds


def test_thresholds_are_restored_after_an_exception(thresholds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="stop"), rare_collections():
        raise ValueError("stop")
    assert gc.get_threshold() == thresholds


@pytest.mark.usefixtures("thresholds")
@pytest.mark.parametrize("own", [(0, 10, 10), (200_000, 10, 10)], ids=["off", "rarer"])
def test_a_collector_that_is_off_or_rarer_is_left_as_it_is(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    with rare_collections():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


@pytest.mark.usefixtures("thresholds")
def test_thresholds_that_the_block_sets_are_kept() -> None:
    with rare_collections():
        gc.set_threshold(900, 9, 9)
    assert gc.get_threshold() == (900, 9, 9)


ENDING = """
import atexit, sys
from lorakit.startup import QuickExit
ending = QuickExit()
atexit.register(lambda: print("registered later"))
class Loud:
    def __del__(self): sys.stderr.write("taken apart")
loud = Loud()
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ENDING + code], capture_output=True, text=True, check=False)


def test_a_quick_exit_runs_exit_functions_and_flushes_and_keeps_the_code() -> None:
    found = ended("print('unflushed', end=''); sys.exit(ending.set_code(3))")
    assert (found.returncode, found.stdout, found.stderr) == (3, "unflushedregistered later\n", "")


def test_without_a_code_the_interpreter_ends_as_usual() -> None:
    found = ended("raise SystemExit(4)")
    assert (found.returncode, found.stdout, found.stderr) == (4, "registered later\n", "taken apart")


def test_a_process_whose_coverage_is_measured_ends_as_usual() -> None:
    found = ended("sys.modules['coverage'] = sys; sys.exit(ending.set_code(5))")
    assert (found.returncode, found.stderr) == (5, "taken apart")


@pytest.mark.parametrize("observe", ["settrace", "setprofile"])
def test_a_debugger_or_profiler_is_noticed(observe: str) -> None:
    code = f"from lorakit.startup import is_observed; sys.{observe}(lambda *_: None); print(is_observed())"
    assert ended(code).stdout == "True\nregistered later\n"
    assert ended("from lorakit.startup import is_observed; print(is_observed())").stdout.startswith("False")


def test_a_command_exits_with_its_code() -> None:
    words = [sys.executable, "-m", "lorakit"]
    assert subprocess.run([*words, "--version"], capture_output=True, check=False).returncode == 0
    assert subprocess.run([*words, "no-such-command"], capture_output=True, check=False).returncode == 2
