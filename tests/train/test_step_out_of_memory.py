"""What is said of a run whose memory ran out: all that helps, in order, without what it does already."""

from __future__ import annotations

import pytest

from lorakit.train.step import relief

ROWS = "half the --per-device-train-batch-size and twice the --gradient-accumulation-steps: the same result"
LAYERS = "--recompute layers (or --gradient-checkpointing)"
LENGTH = "a smaller --max-length"


@pytest.mark.parametrize(
    ("recompute", "budgeted", "helps"),
    [
        (
            "none",
            False,
            ["--recompute feed-forward", LAYERS, "--memory-budget, which chooses between these two", ROWS, LENGTH],
        ),
        ("feed-forward", False, [LAYERS, ROWS, LENGTH]),
        ("layers", False, [ROWS, LENGTH]),
        ("none", True, ["a smaller --memory-budget", ROWS, LENGTH]),
        ("feed-forward", True, ["a smaller --memory-budget", ROWS, LENGTH]),
        ("layers", True, [ROWS, LENGTH]),
    ],
)
def test_what_is_not_on_yet_is_named_in_order(recompute: str, budgeted: bool, helps: list[str]) -> None:
    said = relief(4, recompute, accelerated=True, budgeted=budgeted)
    assert said == f"What helps, to try in this order: {'; '.join(helps)}."


def test_a_model_that_runs_as_it_is_computes_whole_layers_again_alone() -> None:
    said = relief(4, "none", accelerated=False, budgeted=False)
    fast = "accelerated forwards (leave --no-accelerate out)"
    assert said == f"What helps, to try in this order: {'; '.join([fast, LAYERS, ROWS, LENGTH])}."


def test_one_row_cannot_be_halved() -> None:
    assert relief(1, "layers", accelerated=True, budgeted=False) == f"What helps, to try in this order: {LENGTH}."
