"""Growth in benchmarks/: slopes of known powers, estimates for the measured model, points of the axes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorakit.plan import Job

from .loading import load

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FIELDS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def growth() -> Any:
    return load("benchmarks/growth.py")


@pytest.fixture(scope="module")
def bench(growth: Any) -> Any:
    for beside in ("resident", "runner", "stepping"):
        load(f"benchmarks/{beside}.py")
    return load("benchmarks/bench_growth.py")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_a_power_has_its_slope(growth: Any, power: float) -> None:
    points = [3, 5, 40, 256]
    assert growth.slope(points, [7.5 * point**power for point in points]) == pytest.approx(power, abs=1e-12)


def test_the_slope_is_the_least_squares_line_of_the_logarithms(growth: Any) -> None:
    # over x = 0, 1, 2 the values y = 0, 1, 0.5 have the slope ((-1)·(-0.5) + 1·0) / 2
    assert growth.slope([1, math.e, math.e**2], [1, math.e, math.e**0.5]) == pytest.approx(0.25)


@pytest.mark.parametrize(("points", "values"), [([4], [1.0]), ([4, 4], [1.0, 2.0]), ([4, 8], [1.0, 0.0])])
def test_what_has_no_slope_is_said(growth: Any, points: list[int], values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needs two different points and values above 0; got \[\(4, 1"):
        growth.slope(points, values)


def test_a_point_of_several_axes_is_measured_once(bench: Any) -> None:
    along = {name: bench.cases_along(axis, 30) for name, axis in bench.AXES.items()}
    assert along["tokens"][1024] == along["layers"][30] == along["rank"][16] == along["attached"][1]
    assert along["tokens"][256] == along["length"][256]
    assert len({case for cases in along.values() for case in cases.values()}) == sum(map(len, along.values())) - 4


def test_fewer_layers_end_their_axis(bench: Any) -> None:
    assert list(bench.cases_along(bench.AXES["layers"], 10)) == [4, 8, 10]
    assert {case.job.layers for case in bench.cases_along(bench.AXES["rank"], 10).values()} == {10}


def test_adapters_that_wait_cost_nothing_by_the_arithmetic(bench: Any) -> None:
    works = {bench.work_of(case) for case in bench.cases_along(bench.AXES["attached"], 30).values()}
    assert len(works) == 1


def test_a_job_may_have_another_rank(bench: Any) -> None:
    assert [bench.adapter_fields(bench.Job(rank=rank))["r"] for rank in (None, 4)] == [16, 4]
    assert bench.adapter_fields(bench.Job(rank=4))["lora_alpha"] == 8


def test_the_arithmetic_is_of_the_model_that_is_measured(growth: Any) -> None:
    sizes, shape = load("benchmarks/stepping.py").LLAMAS["smollm2"], growth.shape_of()
    measured = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "vocab_size": shape.vocab}
    measured |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    assert sizes == measured | {"num_hidden_layers": shape.layers, "tie_word_embeddings": shape.tied}


def test_fewer_layers_are_the_rest_of_the_model(growth: Any) -> None:
    whole, half = growth.shape_of(), growth.shape_of(15)
    assert growth.shape_of(30).sites == whole.sites
    assert growth.shape_of(30).parameters == whole.parameters
    outside = whole.vocab * whole.hidden + whole.hidden  # the tied table and the last norm
    assert half.layers == 15
    assert half.parameters - outside == (whole.parameters - outside) // 2


def test_a_step_grows_with_its_tokens_and_more_with_their_length(growth: Any) -> None:
    points = [256, 512, 1024]
    rows = [growth.of_step(FIELDS, Job(n // 256, 256, accelerated=True)) for n in points]
    lengths = [growth.of_step(FIELDS, Job(1, n, accelerated=True)) for n in points]
    assert growth.slope(points, [work.flops for work in rows]) == pytest.approx(1.0)
    assert growth.slope(points, [work.flops for work in lengths]) > 1.02
    assert rows[0] == lengths[0]


def test_more_adapters_are_more_to_read_and_nothing_more_to_multiply(growth: Any) -> None:
    job = Job(32, 1)
    one, three, five = (growth.of_decoding(FIELDS, job, adapters) for adapters in (1, 3, 5))
    assert one.flops == three.flops
    each = 2 * 4_884_480  # bf16 elements of rank 16 on all linear layers
    assert one.read_bytes == 2 * growth.shape_of().parameters + each
    assert three.read_bytes - one.read_bytes == five.memory_bytes - three.memory_bytes == 2 * each
