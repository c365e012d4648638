"""The learning rate as a function of the step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from lorakit.errors import ConfigError, UsageError
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.spec import Schedule, schedule


def made(peak: float, total: int, **more: Any) -> Schedule:
    settings = TrainSettings(model="m", data="d.txt", output_dir="out", learning_rate=peak, **more)
    return schedule(settings, total)


def rates(peak: float, total: int, **more: Any) -> list[float]:
    course = made(peak, total, **more)
    return [course.rate(step) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.05), (1, 0.0), (7, 0.0), (100, 0.05), (10, 1.0)])
def test_every_step_of_a_run_moves_and_none_passes_the_peak(kind: str, total: int, ratio: float) -> None:
    found = rates(0.5, total, warmup_ratio=ratio, lr_scheduler_type=kind)
    assert all(0 < rate <= 0.5 for rate in found)
    assert max(found) == 0.5


def test_the_warm_up_rises_evenly_and_the_rest_falls() -> None:
    found = rates(1.0, 100, warmup_ratio=0.1, lr_scheduler_type="cosine")
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(found[9:]))
    assert found[55] == pytest.approx(0.5)
    assert found[99] == pytest.approx((1 + math.cos(math.pi * 89 / 90)) / 2)


def test_linear_and_constant() -> None:
    assert rates(1.0, 4, warmup_ratio=0.0, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(1.0, 4, warmup_ratio=0.0, lr_scheduler_type="constant") == [1.0] * 4


def test_wsd_is_constant_until_the_last_fraction_and_then_falls_like_a_root() -> None:
    found = rates(2.0, 100, warmup_ratio=0.05, lr_scheduler_type="wsd", decay_ratio=0.25)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[5:76] == [2.0] * 71  # the decay of 25 steps begins at the peak, at step 75
    assert found[76:] == pytest.approx([2 * (1 - math.sqrt(n / 25)) for n in range(1, 25)])


def test_the_decay_of_wsd_never_reaches_into_the_warm_up() -> None:
    found = rates(1.0, 10, warmup_steps=8, lr_scheduler_type="wsd", decay_ratio=1.0)
    assert found[:8] == pytest.approx([(i + 1) / 8 for i in range(8)])
    assert found[8:] == pytest.approx([1.0, 1 - math.sqrt(0.5)])


def test_a_warm_up_in_steps_replaces_the_usual_fraction() -> None:
    assert made(1.0, 200).warmup_steps == 10
    assert made(1.0, 200, warmup_steps=3).warmup_steps == 3
    assert made(1.0, 200, warmup_steps=0).rate(0) == 1.0
    assert made(1.0, 200, warmup_ratio=0.2).warmup_steps == 40


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"warmup_steps": 4, "warmup_ratio": 0.1}, "warmup_steps"),
        ({"warmup_steps": 0, "warmup_ratio": 0.0}, "warmup_steps"),
        ({"decay_ratio": 0.1}, "decay_ratio"),
        ({"decay_ratio": 0.1, "lr_scheduler_type": "linear"}, "decay_ratio"),
    ],
)
def test_lengths_that_do_not_fit_each_other(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(1.0, 10, **values)
    assert caught.value.field == field
    assert all(name in str(caught.value) for name in values)


def test_a_warm_up_longer_than_the_run() -> None:
    assert made(1.0, 10, warmup_steps=10).rate(9) == 1.0
    with pytest.raises(UsageError) as caught:
        made(1.0, 10, warmup_steps=11)
    assert (caught.value.field, caught.value.what) == ("warmup_steps", "11")


def test_settings_of_a_run_with_a_warm_up_in_steps_can_be_read_again() -> None:
    settings = TrainSettings(model="m", data="d.txt", output_dir="out", warmup_steps=4, lr_scheduler_type="wsd")
    assert TrainSettings(**settings.as_dict()) == settings


def test_past_the_end_the_rate_is_zero_not_negative() -> None:
    for kind in ("linear", "cosine", "wsd"):
        assert made(1.0, 4, warmup_ratio=0.0, lr_scheduler_type=kind).rate(9) == 0.0
