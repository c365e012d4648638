"""`recompute` and `memory_budget` of a run: losses are bit-identical, the choice is printed and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.report import read_metrics
from lorakit.train import TrainSettings, run
from lorakit.train.progress import PlainProgress
from lorakit.train.setup import fitting


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    return {**short_run, "eval_fraction": 0.0, "max_steps": 3, "lora_dropout": 0.1, "tuning": False}


def losses(settings: dict[str, Any], folder: Path, **more: Any) -> tuple[list[float], dict[str, Any]]:
    """Return the losses of a run and the planned job."""
    run(TrainSettings(**{**settings, "output_dir": folder, **more}), PlainProgress())
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in read_metrics(folder).train], record["plan"]["job"]


def test_every_way_has_the_same_losses(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    real = fitting.accelerate

    def listening(model: Any, *, keep_feed_forward: bool) -> Any:
        kept.append(keep_feed_forward)
        return real(model, keep_feed_forward=keep_feed_forward)

    monkeypatch.setattr(fitting, "accelerate", listening)
    found = {way: losses(settings, tmp_path / way, recompute=way) for way in ("none", "feed-forward", "layers")}
    found["flag"] = losses(settings, tmp_path / "flag", gradient_checkpointing=True)
    assert len({tuple(values) for values, _ in found.values()}) == 1
    assert [job["recompute"] for _, job in found.values()] == ["none", "feed-forward", "layers", "layers"]
    assert kept == [True, False, True, True]


def test_a_budget_chooses_and_says_so(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, job = losses(settings, tmp_path / "wide", memory_budget="4GiB")
    assert job["recompute"] == "none"
    said = capsys.readouterr().out
    assert "memory budget 4.29 GB: --recompute none is the cheapest setting that fits " in said
    with pytest.raises(ConfigError, match=r"does not fit in a memory budget of 1.0 MB: .* A batch of 1 needs"):
        losses(settings, tmp_path / "narrow", memory_budget="1MB")
    assert not (tmp_path / "narrow" / "run.json").exists()


def test_what_cannot_be_meant_is_refused_with_the_settings(settings: dict[str, Any]) -> None:
    for words, said in (
        ({"recompute": "feedforward"}, "recompute is 'feedforward'; it must be .*Did you mean feed-forward"),
        ({"memory_budget": "much"}, "memory_budget is 'much'; write a number and a unit, such as 4GiB or 800MB"),
        (
            {"memory_budget": "1GB", "gradient_checkpointing": True},
            "memory_budget and recompute=layers are mutually exclusive",
        ),
        ({"recompute": "feed-forward", "accelerate": False}, "recompute=feed-forward needs accelerated forward passes"),
    ):
        with pytest.raises(ConfigError, match=said):
            TrainSettings(**{**settings, "output_dir": "run", **words})
