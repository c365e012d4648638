"""Advice for a run that is out of memory: all options, in order, without what is already enabled."""

from __future__ import annotations

import pytest
import torch

from lorakit.speed import Acceleration
from lorakit.train.loop.step import StepOptions

ROWS = "half the --per-device-train-batch-size with twice the --gradient-accumulation-steps (same result)"
LAYERS = "--recompute layers (or --gradient-checkpointing)"
LENGTH = "a smaller --max-length"
FUSED = Acceleration((), (), None, "")


def advice(rows: int, recompute: str, acceleration: Acceleration | None = FUSED, limited_by: str | None = None) -> str:
    options = StepOptions(torch.device("cpu"), acceleration=acceleration, recompute=recompute, limited_by=limited_by)
    return options.oom_advice(rows)


@pytest.mark.parametrize(
    ("recompute", "limited_by", "helps"),
    [
        (
            "none",
            None,
            ["--recompute feed-forward", LAYERS, "--memory-budget, which chooses between these two", ROWS, LENGTH],
        ),
        ("feed-forward", None, [LAYERS, ROWS, LENGTH]),
        ("layers", None, [ROWS, LENGTH]),
        ("none", "memory_budget", ["a smaller --memory-budget", ROWS, LENGTH]),
        ("feed-forward", "memory_budget", ["a smaller --memory-budget", ROWS, LENGTH]),
        ("layers", "memory_budget", [ROWS, LENGTH]),
    ],
)
def test_what_is_not_on_yet_is_named_in_order(recompute: str, limited_by: str | None, helps: list[str]) -> None:
    said = advice(4, recompute, limited_by=limited_by)
    assert said == f"Try, in this order: {'; '.join(helps)}."


def test_a_model_that_runs_as_it_is_computes_whole_layers_again_alone() -> None:
    said = advice(4, "none", None)
    fast = "fused forward passes (omit --no-accelerate)"
    assert said == f"Try, in this order: {'; '.join([fast, LAYERS, ROWS, LENGTH])}."


def test_one_row_cannot_be_halved() -> None:
    assert advice(1, "layers") == f"Try, in this order: {LENGTH}."


def test_with_fit_the_advice_is_a_smaller_limit() -> None:
    said = advice(4, "none", limited_by="fit")
    assert "a smaller --fit" in said and "--recompute" not in said and "--memory-budget" not in said
