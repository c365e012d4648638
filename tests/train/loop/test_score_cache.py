"""The evaluation before the first step is kept for later runs with the same start, and for no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.caches import CACHES, EVALUATIONS
from lorakit.ops.int8 import why_no_int8_matmuls
from lorakit.report import read_metrics
from lorakit.session.measuring import Evaluation
from lorakit.train.loop import loop, score_cache
from lorakit.train.loop.loop import evaluate
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.trainer import run

from ..said import Said

NEEDS_INT8 = pytest.mark.skipif(bool(why_no_int8_matmuls()), reason="the processor has no int8 matmuls")
REUSED = "The evaluation at step 0 was read from the cache"


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Evaluation | None]:
    """The evaluations that were computed."""
    found: list[Evaluation | None] = []

    def counted(*arguments: Any) -> Evaluation | None:
        found.append(evaluate(*arguments))
        return found[-1]

    monkeypatch.setattr(loop, "evaluate", counted)
    return found


@pytest.fixture
def settings(short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run with two steps and two evaluations, on a copy of the model."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(score_cache, "LEAST_SECONDS", 0.0)
    model = shutil.copytree(short_run["model"], tmp_path / "model")
    more = {"eval_fraction": 0.2, "max_steps": 2, "eval_steps": 2, "lora_dropout": 0.1, "overwrite": True}
    return {**short_run, **more, "model": model, "tuning": False}


def trained(settings: dict[str, Any], **more: Any) -> tuple[bool, dict[str, torch.Tensor]]:
    """Train, and return whether the kept evaluation was reused, and the adapter."""
    said = Said()
    result = run(TrainSettings(**{**settings, **more}), said)
    assert result.adapter is not None
    return any(REUSED in line for line in said.lines), load_file(result.adapter / "adapter_model.safetensors")


def test_a_run_keeps_nothing_outside_the_table_of_caches(settings: dict[str, Any], tmp_path: Path) -> None:
    trained(settings, tuning=True)
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert EVALUATIONS.place in kept <= {cache.place for cache in CACHES}


def rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return read_metrics(settings["output_dir"]).evaluations


def test_a_run_with_the_same_start_reuses_the_evaluation_bit_for_bit(
    settings: dict[str, Any], evaluated: list[Evaluation | None]
) -> None:
    is_reused, adapter = trained(settings)
    first = rows(settings)
    assert (is_reused, len(evaluated)) == (False, 2)
    is_reused, again = trained(settings)
    assert (is_reused, len(evaluated)) == (True, 3)
    assert rows(settings) == first
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


def test_the_learning_rate_and_the_number_of_steps_do_not_matter(settings: dict[str, Any]) -> None:
    trained(settings)
    assert trained(settings, learning_rate=5e-4, max_steps=3)[0]


@pytest.mark.costly
@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"max_length": 20},
        {"seed": 1},
        {"r": 3},
        {"lora_alpha": 5},
        {"accelerate": False},
        pytest.param({"base_matmul": "int8", "int8_loss_bound": 9.0}, marks=NEEDS_INT8),
    ],
    ids=str,
)
def test_another_start_is_evaluated(settings: dict[str, Any], other: dict[str, Any]) -> None:
    trained(settings)
    assert not trained(settings, **other)[0]
    assert trained(settings)[0]


def test_other_data_is_evaluated(settings: dict[str, Any]) -> None:
    trained(settings)
    for path in settings["data"]:
        path.write_text(path.read_text().replace("lazy", "busy"))
    assert not trained(settings)[0]


def test_another_base_in_the_same_directory_is_evaluated(settings: dict[str, Any]) -> None:
    trained(settings)
    path = settings["model"] / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] * 1.5
    save_file(weights, path, metadata={"format": "pt"})
    assert not trained(settings)[0]


def test_another_config_of_the_base_is_evaluated(settings: dict[str, Any]) -> None:
    trained(settings)
    path = settings["model"] / "config.json"
    config = json.loads(path.read_text())
    config["pad_token_id"] = 3
    path.write_text(json.dumps(config))
    assert not trained(settings)[0]


@pytest.mark.costly
@pytest.mark.parametrize("damage", ["", "{", '{"format": 4, "scores": {}}', "changed"], ids=str)
def test_a_damaged_file_is_ignored_and_replaced(settings: dict[str, Any], tmp_path: Path, damage: str) -> None:
    trained(settings)
    (path,) = (tmp_path / "cache" / EVALUATIONS.place).iterdir()
    path.write_text(path.read_text().replace('"loss": ', '"loss": 1') if damage == "changed" else damage)
    assert not trained(settings)[0]
    assert trained(settings)[0]


def test_without_the_cache_nothing_is_kept_or_reused(settings: dict[str, Any], tmp_path: Path) -> None:
    trained(settings, token_cache=False)
    assert not (tmp_path / "cache" / EVALUATIONS.place).exists()
    trained(settings)
    assert not trained(settings, token_cache=False)[0]


def test_a_short_evaluation_is_not_kept(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(score_cache, "LEAST_SECONDS", 1e6)
    trained(settings)
    assert not (tmp_path / "cache" / EVALUATIONS.place).exists()


def test_a_base_whose_files_are_not_known_is_evaluated(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_cache, "weight_file_inputs", lambda model: {})
    trained(settings)
    assert not trained(settings)[0]


def test_a_cache_that_cannot_be_written_is_no_error(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in place of the directory")
    said = Said()
    assert run(TrainSettings(**settings), said).adapter is not None
    assert any("is not kept for later runs" in line for line in said.lines)


def test_the_oldest_entries_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(score_cache, "MOST_KEPT", 2)
    for key in ("a", "b", "a", "c"):
        assert score_cache.write(key, Evaluation(0.1 + 0.2, 7, {"accuracy": 1 / 3})) == ""
    assert score_cache.read("b") is None
    assert score_cache.read("a") == score_cache.read("c") == Evaluation(0.1 + 0.2, 7, {"accuracy": 1 / 3})
