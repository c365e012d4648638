"""A memory limit selects the rows per batch and what is recomputed; the rows per step stay the same."""

from __future__ import annotations

import pytest

from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.plan import Job, Plan, catalogue, estimate
from lorakit.plan.budget import by_cost, describe, fitting, needed_bytes, smaller


def planned(accelerated: bool = True) -> Plan:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    job = Job(4, 512, accumulation=2, accelerated=accelerated)
    return estimate(shape, LoraConfig(r=16, target_modules="all-linear"), job)


@pytest.mark.parametrize(("accelerated", "ways"), [(True, 3), (False, 2)])
def test_all_settings_have_the_same_rows_per_step(accelerated: bool, ways: int) -> None:
    made = by_cost(planned(accelerated))
    assert {plan.job.batch_rows * plan.job.accumulation for plan in made} == {8}
    assert len(made) == ways * 4  # batches of 1, 2, 4 and 8 rows
    assert (made[0].job.batch_rows, made[0].job.recompute) == (8, "none")
    assert (made[-1].job.batch_rows, made[-1].job.recompute) == (1, "layers")


@pytest.mark.costly(cases=0)
def test_a_smaller_limit_selects_a_smaller_and_slower_setting() -> None:
    limits = sorted({needed_bytes(plan) for plan in by_cost(planned())}, reverse=True)
    chosen = [fitting(planned(), limit)[0] for limit in limits]
    assert all(needed_bytes(plan) <= limit for plan, limit in zip(chosen, limits, strict=True))
    costs = [plan.lora.flops.total for plan in chosen]
    assert chosen[0].job.recompute == "none" and costs[-1] > costs[0]
    with pytest.raises(ConfigError, match="--quantization") as caught:
        fitting(planned(), limits[-1] - 1)
    assert caught.value.fields["field"] == "fit"


def test_smaller_plans_keep_their_order() -> None:
    made = by_cost(planned())
    found = smaller(made, made[0])
    assert made[0] not in found and found == [plan for plan in made if plan in found]


def test_one_line_describes_a_choice() -> None:
    text = describe(planned(), 8_000_000_000, 2_000_000_000)
    for word in ("8.00 GB", "--per-device-train-batch-size 4", "--gradient-accumulation-steps 2", "measured 2.00 GB"):
        assert word in text
    assert "\n" not in text
