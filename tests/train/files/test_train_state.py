"""When a later step replaces the best one."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from lorakit.train.files.train_state import TrainState


def test_the_earlier_step_stays_unless_the_rows_agree() -> None:
    state, counts = TrainState(step=1), [1] * 4
    assert state.note_evaluation(1.0, [1.0, 1.0, 1.0, 1.0], counts)
    state.step = 2  # lower by 0.05 on average, because of one row: the standard error is 0.05
    assert not state.note_evaluation(0.95, [0.8, 1.0, 1.0, 1.0], counts)
    assert (state.best_step, state.stale_evaluations, state.last_loss) == (1, 1, 0.95)
    state.step = 3  # lower by 0.03 on every row
    assert state.note_evaluation(0.97, [0.97, 0.97, 0.97, 0.97], counts)
    assert (state.best_step, state.best_loss, state.stale_evaluations) == (3, 0.97, 0)
    again = TrainState.from_dict(dataclasses.asdict(state))
    assert again == state and again.best_rows == [0.97] * 4


def test_without_the_losses_of_rows_the_lower_loss_wins() -> None:
    state = TrainState.from_dict({"step": 5, "data": {}, "best_step": 5, "best_loss": 1.0, **_of_earlier_versions()})
    state.step = 6
    assert state.note_evaluation(0.99, [0.5, 1.48], [1, 1])  # the checkpoint has no rows
    state.step = 7
    assert not state.note_evaluation(0.98, [0.5, 1.46], [1, 1])
    single = TrainState(step=2, best_step=1, best_loss=1.0, best_rows=[3.0])
    assert single.note_evaluation(0.9, [2.7], [3])


def _of_earlier_versions() -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(TrainState)} - {"best_rows", "step", "data"}
    return {name: getattr(TrainState(), name) for name in names - {"best_step", "best_loss"}}


def test_noise_rarely_replaces_the_best_step() -> None:
    """Under no improvement, a later evaluation is better by one standard error in about 16% of the cases, not in 50%."""
    rng, better = random.Random(0), 0
    for _ in range(1000):
        before, now = ([rng.gauss(2, 1) for _ in range(20)] for _ in range(2))
        state = TrainState(step=2, best_step=1, best_loss=sum(before) / 20, best_rows=before)
        better += state.note_evaluation(sum(now) / 20, now, [1] * 20)
    assert 120 < better < 210
