"""Imports at start-up: nothing heavy is loaded early. benchmarks/bench_startup.py measures the time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import COMMANDS

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


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_no_torch(words: list[str]) -> None:
    found = loaded_by(f"from lorakit.cli import main; assert main({words}) == 0")
    assert not found & HEAVY


def test_wrong_usage_of_train_is_reported_before_plan_yaml_and_torch_are_loaded(tmp_path: Path) -> None:
    words = ["train", "--model", "smollm2", "--data", str(tmp_path / "none.txt"), "--output-dir", str(tmp_path / "run")]
    code = f"from lorakit.cli import main; assert main({words}) == 1; assert 'lorakit.plan' not in sys.modules"
    assert not loaded_by(f"import sys; {code}") & (HEAVY | {"yaml"})
