"""Every example runs, prints what it promises, and is short enough to read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here() -> None:
    tested = {"quickstart", "many_adapters", "alpha_and_learning_rate", "naive_lora", "reference_project"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    limit = 400 if path.stem == "reference_project" else 65
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    load("quickstart").main()
    told = capsys.readouterr().out
    assert "trained numbers at 14 sites" in told
    assert "row of the base is the base: True" in told
    assert "loaded: same base" in told


def test_many_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("many_adapters")
    example.main()
    told = capsys.readouterr().out
    assert "summarise, translate, classify" in told
    difference = float(told.split("one by one: ")[1].split()[0])
    assert difference < 1e-5
    model = example.base_with_adapters()
    tokens = example.torch.randint(0, 100, (3, 12))
    alone = example.one_by_one(model, tokens)
    assert (alone - example.mixed(model, tokens).roll(1, 0)).abs().max() > 0.01  # the adapters do differ


def test_alpha_and_learning_rate() -> None:
    assert load("alpha_and_learning_rate").table().count("\n") == 6
