"""Whole runs in two processes: files, checkpoints, resumption, and errors that end both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.report import read_metrics
from lorakit.train.files import checkpoint
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.trainer import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

ADAPTER = "adapter/adapter_model.safetensors"


def test_a_run_equals_that_of_one_process_and_resumes(
    steady_run: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    settings = steady_run
    two, whole, alone, stopped = (str(tmp_path / name) for name in ("two", "whole", "alone", "stopped"))
    noisy = {**settings, "lora_dropout": 0.2}
    parts = {**noisy, "output_dir": str(tmp_path / "parts")}
    runs = [
        {**settings, "output_dir": two, "max_steps": 6},
        {**noisy, "output_dir": whole, "max_steps": 6},
        {**parts, "max_steps": 4},
        {**parts, "max_steps": 6, "resume": True},
        {**settings, "output_dir": stopped, "max_steps": 9, "eval_steps": 5, "by_rank": {"1": {"signal_at": 3}}},
    ]
    first, second = outcomes(runs)
    endings = [(one["ending"], one["steps"]) for one in first]
    assert endings == [*(("finished", steps) for steps in (6, 6, 4, 6)), ("interrupted", 3)]
    assert endings == [(one["ending"], one["steps"]) for one in second]
    assert checkpoint.newest_valid(Path(stopped)) == Path(stopped, "checkpoint-3")
    run(TrainSettings(**{**settings, "output_dir": alone, "max_steps": 6, "gradient_accumulation_steps": 2}))
    rows, expected = read_metrics(Path(two)), read_metrics(Path(alone))
    assert [row["tokens"] for row in rows.train] == [row["tokens"] for row in expected.train]
    assert [r["loss"] for r in rows.train] == pytest.approx([r["loss"] for r in expected.train], rel=1e-5)
    assert [r["eval_loss"] for r in rows.evaluations] == pytest.approx(
        [r["eval_loss"] for r in expected.evaluations], rel=1e-5
    )
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    seed = settings.get("seed", 0)
    assert record["processes"] == {"count": 2, "seeds": [seed, seed + 1], "seeded_at": 0}
    assert (record["resolved"]["processes"], record["resolved"]["accumulation"]) == (2, 2)
    saved = checkpoint.load(tmp_path / "whole" / "checkpoint-6")
    assert len(saved.random) == 2
    assert saved.random_of(0, 2) is not None
    assert saved.random_of(0, 1) is None
    result = run(TrainSettings(**{**noisy, "output_dir": whole, "resume": True, "max_steps": 8}))
    assert (result.ending, result.steps) == ("finished", 8)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["resolved"]["accumulation"] == 2


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize(
    "names", [("seed", "data"), ("output_dir", "fit"), ("model", "rows"), ("base", "nan")], ids="-".join
)
def test_errors_that_end_all_processes(
    names: tuple[str, ...], steady_run: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    settings = steady_run
    other = tmp_path / "other.txt"
    other.write_text("Quite another text, about nothing. " * 4)
    (tmp_path / "cwd").mkdir()
    bases = [tmp_path / "first" / "m", tmp_path / "second" / "m"]
    for folder in bases:
        shutil.copytree(settings["model"], folder)
    weights = load_file(bases[1] / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, bases[1] / "model.safetensors", {"format": "pt"})
    base = {**settings, "max_steps": 3}
    cases: dict[str, dict[str, Any]] = {
        "seed": {**base, "by_rank": {"1": {"seed": 5}}},
        "data": {**base, "by_rank": {"1": {"data": [str(other)]}}},
        "output_dir": {**base, "output_dir": "here", "by_rank": {"1": {"cwd": str(tmp_path / "cwd")}}},
        "fit": {**base, "fit": "10MB"},
        "model": {**base, "by_rank": {"1": {"model": str(tmp_path / "missing")}}},
        "rows": {**base, "data": base["data"][:1], "max_length": 128, "eval_fraction": 0},
        "nan": {
            **base,
            "output_dir": str(tmp_path / "nan"),
            "learning_rate": 1e30,
            "max_grad_norm": 0,
            "save_steps": 1,
        },
        "base": {
            **base,
            "model": "./m",
            "by_rank": {str(rank): {"cwd": str(folder.parent)} for rank, folder in enumerate(bases)},
        },
    }
    first, second = outcomes([cases[name] for name in names])
    expected = {
        "seed": ("UsageError", "seed", "5 in process 1"),
        "data": ("UsageError", "data", ""),
        "output_dir": ("RunError", "output_dir", "process 1: "),
        "fit": ("ConfigError", "fit", ""),
        "model": ("ModelError", None, "process 1: "),
        "rows": ("DataError", "data", ""),
        "base": ("UsageError", "fingerprint of the base", ""),
        "nan": ("NonFiniteError", None, ""),
    }
    for name, error in zip(names, first, strict=True):
        kind, field, words = expected[name]
        assert (error["kind"], error["field"]) == (kind, field)
        assert words in error["message"]
    assert "nan" not in names or checkpoint.newest_valid(tmp_path / "nan") == tmp_path / "nan" / "checkpoint-1"
    assert [one["kind"] for one in first] == [one["kind"] for one in second]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cwd" / "here").exists()
