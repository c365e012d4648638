from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lorakit.architectures.shapes import ModelShape
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.plan import Job, Plan, Speed, catalogue, estimate, flops


def _gpt2() -> ModelShape:
    shape = catalogue.published("gpt2")
    assert shape is not None
    return shape


def _plan(job: Job | None = None, speed: Speed | None = None) -> Plan:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"])
    return estimate(_gpt2(), config, job, speed, ranks=[4, 8])


def test_without_a_speed_there_is_no_time_and_the_plan_says_why() -> None:
    plan = _plan(Job(steps=10))
    assert plan.lora.tokens_per_second is plan.lora.step_seconds is plan.lora.run_seconds is None
    assert any(note.startswith("No time estimate") for note in plan.notes)


def test_a_rate_of_tokens_gives_the_times() -> None:
    plan = _plan(Job(4, 256, accumulation=2, steps=100), Speed(tokens_per_second=512))
    assert (plan.lora.step_seconds, plan.lora.run_seconds) == (4.0, 400.0)
    assert plan.full.run_seconds == pytest.approx(400 * plan.full.flops.total / plan.lora.flops.total)


def test_a_rate_of_flops_gives_the_times_with_its_share() -> None:
    plan = _plan(Job(4, 256), Speed(flops_per_second=1e11))
    assert plan.lora.step_seconds == pytest.approx(1024 * plan.lora.flops.total / 4e10)
    assert any("40% of the measured matmul speed" in note for note in plan.notes)


def test_an_accelerated_run_is_reckoned_by_its_products_and_what_passes_beside_them() -> None:
    job, speed = Job(4, 256, accelerated=True), Speed(flops_per_second=1e11, threads=2)
    plan = _plan(job, speed)
    beside = flops.elements(_gpt2(), job) * flops.SECONDS_PER_ELEMENT / 2
    products = plan.lora.flops.total / (1e11 * flops.MATMUL_UTILIZATION)
    assert plan.lora.step_seconds == pytest.approx(1024 * (products + beside))
    assert plan.full.step_seconds == pytest.approx(1024 * plan.full.flops.total / 4e10)  # never accelerated
    assert any("plus the time for norms" in note for note in plan.notes)
    faster = _plan(job, Speed(flops_per_second=1e13, threads=2)).lora.step_seconds
    assert faster == pytest.approx(1024 * (products / 100 + beside))  # not reduced by fast matmuls


@pytest.mark.parametrize(
    ("config", "job", "speed"),
    [
        ({}, Job(), Speed(flops_per_second=1e11, threads=2)),  # transformers' own forwards
        ({}, Job(accelerated=True), Speed(flops_per_second=1e11)),  # another device
        ({"use_dora": True}, Job(accelerated=True), Speed(flops_per_second=1e11, threads=2)),  # unfused sublayers
        ({}, Job(accelerated=True, quantization="nf4"), Speed(flops_per_second=1e11, threads=2)),
    ],
)
def test_what_is_not_wholly_accelerated_takes_its_share_of_the_rate(
    config: dict[str, bool], job: Job, speed: Speed
) -> None:
    targets = LoraConfig(r=8, target_modules=["c_attn", "c_proj"], **config)  # type: ignore[arg-type]
    plan = estimate(_gpt2(), targets, job, speed)
    assert plan.lora.tokens_per_second == pytest.approx(4e10 / plan.lora.flops.total)


def test_a_rate_that_an_earlier_run_printed_wins() -> None:
    speed = Speed(flops_per_second=1e11, tokens_per_second=300, threads=2)
    assert _plan(Job(accelerated=True), speed).lora.tokens_per_second == 300


def test_rows_longer_than_the_model_takes_are_noted() -> None:
    assert any("at most 1,024 tokens; the job's rows have 2,048" in note for note in _plan(Job(1, 2048)).notes)


def test_the_dictionary_is_json_and_complete() -> None:
    values = json.loads(json.dumps(_plan(Job(steps=3), Speed(tokens_per_second=100)).as_dict(), allow_nan=False))
    assert values["adapter"]["trainable"] == 811_008
    assert values["adapter"]["base"] == values["model"]["parameters"] == 124_439_808
    assert values["ranks"]["totals"] == [405_504, 811_008]
    assert values["lora"]["memory"]["peak_bytes"] > values["lora"]["memory"]["above_weights_bytes"]
    assert values["job"]["run_tokens"] == 3 * 1024
    assert values["files"][0]["size_bytes"] == values["lora"]["saved_bytes"] == 3_244_032
    assert values["full_fine_tuning"]["trainable"] == 124_439_808


def test_the_config_is_not_changed_and_needs_targets() -> None:
    config = LoraConfig(r=8, rank_pattern={"c_attn": 4}, target_modules=["c_attn"])
    before = config.to_dict()
    estimate(_gpt2(), config, ranks=[16])
    assert config.to_dict() == before
    with pytest.raises(ConfigError, match="target_modules is not set"):
        estimate(_gpt2(), LoraConfig())


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from lorakit import plan; from lorakit.config import LoraConfig; "
        "p = plan.estimate(plan.catalogue.published('Llama-3.1-8B'), LoraConfig(target_modules='all-linear')); "
        "plan.render(p); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
