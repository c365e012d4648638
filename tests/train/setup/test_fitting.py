"""The probe of `fit` changes nothing, and a plan that needs too much is replaced by a smaller one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.data import Sequences
from lorakit.errors import ConfigError
from lorakit.plan import Job, Plan, catalogue, estimate
from lorakit.plan.budget import by_cost
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData
from lorakit.train.loop.step import StepOptions
from lorakit.train.setup.fitting import GROWTH, Probe, longest_rows, settle

PLAIN = TaskOnData(CAUSAL_LM, Target())


def plans() -> list[Plan]:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    return by_cost(estimate(shape, LoraConfig(target_modules="all-linear"), Job(8, 256, accelerated=True)))


def rows_of(*sizes: int) -> Sequences:
    rows = Sequences()
    for size in sizes:
        rows.add(list(range(1, size + 1)), [True] * size)
    return rows


def test_the_first_plan_that_is_measured_to_fit_is_chosen() -> None:
    proposed = plans()
    assert settle(proposed, 1000, lambda _: 900) == (proposed[0], 900)
    tried: list[Plan] = []

    def measure(plan: Plan) -> int:
        tried.append(plan)
        return 1000 if len(tried) < 3 else 100

    found, used = settle(proposed, 1000, measure)
    assert (found, used) == (tried[2], 100)
    steps = [plan.lora.memory.step_bytes for plan in tried]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 3


def test_if_no_plan_fits_the_error_gives_the_smallest_need() -> None:
    with pytest.raises(ConfigError, match=r"needs at least 2\.00 GB") as caught:
        settle(plans(), 10**9, lambda _: round(2e9 * (1 - GROWTH)))
    assert caught.value.fields["field"] == "fit"


def test_the_longest_rows_of_all_parts() -> None:
    found = longest_rows([rows_of(3, 9, 4), rows_of(7, 2)], 3)
    assert [len(row) for row in found] == [9, 7, 4]


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_probe_changes_nothing(tiny_llama: Any, accumulates: bool) -> None:
    core.attach(tiny_llama, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    tiny_llama.eval()
    named = core.trainable_parameters(tiny_llama)
    gradients = [torch.ones_like(parameter) for _, parameter in named]
    for (_, parameter), gradient in zip(named, gradients, strict=True):
        parameter.grad = gradient
    values, state = [p.detach().clone() for _, p in named], torch.get_rng_state()
    probe = Probe(tiny_llama, named, longest_rows([rows_of(5, 9, 4)], 2), 0, {}, PLAIN)
    assert probe.peak_bytes(2, accumulates, StepOptions(torch.device("cpu"))) < 1 << 62
    assert torch.equal(torch.get_rng_state(), state)
    for (_, parameter), gradient, value in zip(named, gradients, values, strict=True):
        assert parameter.grad is gradient and bool((gradient == 1).all()) and torch.equal(parameter, value)
