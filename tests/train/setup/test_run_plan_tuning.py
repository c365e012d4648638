"""Autotuned choices of a run: they apply to every step and are saved in its checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.ops import choices
from lorakit.report import read_metrics
from lorakit.speed import tuning as choosing
from lorakit.train.files import checkpoint
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import run_plan
from lorakit.train.trainer import run

from ..said import Said

SLICE = 16


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Simulate a machine on which every small matmul is faster in slices; collects the rows of each sliced one."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "ROWS", (48, 96))
    monkeypatch.setattr(choices, "SLICES", (SLICE,))
    monkeypatch.setattr(choosing, "FEWEST_FLOPS", 0)
    monkeypatch.setattr(choosing, "BUSY", math.inf)  # regardless of the load of this machine
    monkeypatch.setattr(choosing, "fastest", lambda task, clock: task.others[0])
    seen, stock = [], choices.matmul_in_slices

    def watched(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.append(len(x))
        return stock(x, *arguments)

    monkeypatch.setattr(choices, "matmul_in_slices", watched)
    return seen


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    return {**short_run, "max_steps": 2, "save_steps": 1}


def _run(settings: dict[str, Any], **more: Any) -> list[str]:
    said = Said()
    run(TrainSettings(**{**settings, **more}), said)
    return said.lines


def _kernels(folder: Path, step: int) -> Any:
    return json.loads((folder / f"checkpoint-{step}" / "state.json").read_text())["environment"]["kernels"]


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder).train]


def test_what_was_chosen_acts_is_said_once_and_is_recorded(
    settings: dict[str, Any], sliced: list[int], tmp_path: Path
) -> None:
    lines = _run(settings)
    assert sum(line.startswith("Autotuning: ") for line in lines) == 1
    assert sliced and all(SLICE < rows <= 96 for rows in sliced)
    kernels = _kernels(tmp_path / "run", 1)
    assert kernels == sorted(kernels) and all(word.endswith(f": {SLICE}") for word in kernels)
    assert _kernels(tmp_path / "run", 2) == kernels
    assert dict(choices._ACTIVE.get()) == {}
    again = _run(settings, output_dir=tmp_path / "again")
    assert not any(line.startswith("Autotuning: ") for line in again)
    assert _losses(tmp_path / "again") == _losses(tmp_path / "run")
    sliced.clear()
    _run(settings, output_dir=tmp_path / "plain", tuning=False)
    assert sliced == []
    assert _kernels(tmp_path / "plain", 2) == []
    assert _losses(tmp_path / "plain") == pytest.approx(_losses(tmp_path / "run"), rel=1e-5)


def test_a_small_model_chooses_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    assert not any("Autotuning: " in line for line in _run(settings))
    assert _kernels(tmp_path / "run", 2) == []
    assert not (tmp_path / "cache").exists()


def test_without_accelerated_forwards_nothing_is_measured(
    settings: dict[str, Any], sliced: list[int], tmp_path: Path
) -> None:
    assert not any("Autotuning: " in line for line in _run(settings, accelerate=False))
    assert sliced == []


def test_a_run_that_goes_on_takes_the_choices_of_its_checkpoint(
    settings: dict[str, Any], sliced: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(settings)
    kernels = _kernels(tmp_path / "run", 2)
    (tmp_path / "cache" / "choices.json").unlink()
    monkeypatch.setattr(choosing, "fastest", lambda task, clock: task.default)  # a new measurement would be reported
    lines = _run(settings, max_steps=3, resume=True)
    assert not any("Autotuning: " in line or "differs from" in line for line in lines)
    assert _kernels(tmp_path / "run", 3) == kernels


def test_a_run_that_goes_on_elsewhere_chooses_anew_and_says_what_differs(
    settings: dict[str, Any], sliced: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(settings)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(choosing, "fastest", lambda task, clock: task.default)
    lines = _run(settings, max_steps=3, resume=True)
    assert any("Autotuning: " in line for line in lines)
    (differs,) = (line for line in lines if "differs from the checkpoint's" in line)
    assert "isa_limit" in differs and "kernels was" in differs
    assert _kernels(tmp_path / "run", 3) == []


@pytest.mark.parametrize(("packs", "tokens"), [(True, 24 + 20), (False, 2 * 24)])
def test_the_largest_batch(packs: bool, tokens: int) -> None:
    class Loader:
        sequences = (range(20), range(3), range(24), range(5))
        batch_rows = 2

    assert run_plan.most_tokens(Loader(), packs) == tokens  # type: ignore[arg-type]


def test_words_of_choices_come_back_and_others_are_passed_over() -> None:
    chosen = {"product 768x4x5 bfloat16 by rows": 512, "attention 256 tokens 9/3x64 bfloat16 causal": 1}
    told = choices.to_strings(chosen)
    assert told == sorted(told)
    assert choices.from_strings([*told, "compiled kernels", 3, None, "x: y", ": 4", "name: -1"]) == chosen
    assert choices.from_strings(None) == choices.from_strings([]) == {}


@pytest.mark.parametrize(("before", "now"), [(None, object()), (object(), None), (None, None)])
def test_compiled_kernels_that_came_or_went_are_said(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, before: object, now: object
) -> None:
    monkeypatch.setattr(checkpoint, "compiled", SimpleNamespace(kernels=lambda: before))
    _run(settings, tuning=False, max_steps=1)
    monkeypatch.setattr(checkpoint, "compiled", SimpleNamespace(kernels=lambda: now))
    said = [line for line in _run(settings, tuning=False, resume=True, max_steps=2) if "differs from" in line]
    words = f"(compiled_kernels was {before is not None} and is {now is not None}): the results will agree within"
    assert [words in line for line in said] == ([] if before is now else [True])
