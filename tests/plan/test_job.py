from __future__ import annotations

from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.plan import Job, Speed


def test_tokens_of_a_step() -> None:
    job = Job(4, 256, accumulation=3)
    assert (job.batch_tokens, job.step_tokens) == (1024, 3072)


def test_short_words_for_dtypes() -> None:
    assert [Job(dtype=word).dtype for word in ("bf16", "fp32", "float16")] == ["bfloat16", "float32", "float16"]
    assert Job(dtype="bf16").dtype_bytes == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_rows": 0}, "batch_rows is 0; it must be an integer >= 1."),
        ({"steps": 0}, "steps is 0; it must be an integer >= 1."),
        ({"dtype": "bfloat61"}, "dtype is 'bfloat61'.*Did you mean bfloat16?"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of adamw, adamw8bit, lorafa, muon."),
    ],
)
def test_what_a_job_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Job(**fields)


def test_a_given_rate_of_tokens_wins() -> None:
    assert Speed(flops_per_second=1e12, tokens_per_second=300).tokens_at(1e9) == 300
    assert Speed(flops_per_second=1e12, utilisation=0.5).tokens_at(1e9) == 500


@pytest.mark.parametrize("fields", [{}, {"tokens_per_second": 0}, {"flops_per_second": -1.0}])
def test_a_speed_is_above_zero(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="speed must be above 0"):
        Speed(**fields)
