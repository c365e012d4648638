"""A memory budget selects the cheapest recomputation that fits, and reports what would fit if none does."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.plan import Job, Plan, Speed, bytes_of, catalogue, estimate, within
from lorakit.plan.job import RECOMPUTED, recomputed


def planned(**fields: Any) -> Plan:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    job = Job(**{"accelerated": True, "mean_tokens": 200.0, **fields})
    return estimate(shape, LoraConfig(r=16, target_modules="all-linear"), job, Speed(1e12), ranks=(4, 8))


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("1.5 GB", 1_500_000_000), ("800mb", 800_000_000), ("2kib", 2048), ("17", 17), ("3 B", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "four", "4 Gib/s", "-1GB", "0GB", "1e9", "GB", "nanGB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write a number and a unit, such as 4GiB or 800MB"):
        bytes_of(text)


def test_the_cheapest_way_that_fits() -> None:
    peaks = [planned(recompute=way).lora.memory.peak_bytes for way in RECOMPUTED]
    costs = [planned(recompute=way).lora.flops.total for way in RECOMPUTED]
    assert peaks == sorted(peaks, reverse=True) and costs == sorted(costs)
    for way, peak in zip(RECOMPUTED, peaks, strict=True):
        for begin in RECOMPUTED:
            found, reason = within(planned(recompute=begin), peak)
            assert found == planned(recompute=way)
            assert f"--recompute {way} is the cheapest setting that fits" in reason
    assert within(planned(), peaks[1])[1] == (
        "memory budget 1.17 GB: --recompute feed-forward is the cheapest setting that fits (1.17 GB); "
        "--recompute none needs 1.36 GB"
    )


def test_what_is_computed_again_is_in_the_flops() -> None:
    shape = planned().shape
    some, all_ = (planned(recompute=way).lora.flops for way in RECOMPUTED[1:])
    inner = [s for s in shape.sites if s.path.endswith(("gate_proj", "up_proj"))]
    factors = sum(2 * 16 * s.out_features for s in inner)
    assert some.recomputed == sum(2 * s.weight_parameters for s in inner) + factors
    assert planned().lora.flops.recomputed == 0
    assert 0.3 < some.recomputed / all_.recomputed < 0.6
    assert planned(recompute="feed-forward", accelerated=False).lora.flops.recomputed == 0


def test_none_fits_and_what_would() -> None:
    long = planned(length_tokens=2048)
    least = planned(length_tokens=2048, recompute="layers").lora.memory.peak_bytes
    smaller = planned(length_tokens=2048, recompute="layers", batch_rows=2).lora.memory.peak_bytes
    with pytest.raises(ConfigError) as caught:
        within(long, least - 1)
    message = str(caught.value)
    assert message.startswith("the job does not fit in a memory budget of ")
    assert "with --recompute layers. A batch of 2 would fit with --recompute layers (" in message
    assert "--gradient-accumulation-steps" in message
    assert smaller < least
    with pytest.raises(
        ConfigError, match=r"A batch of 1 needs [0-9.]+ GB [(]weights 269 MB[)]: use a smaller --max-length"
    ):
        within(planned(), 1_000_000)


def test_a_plan_without_accelerated_forwards_goes_from_none_to_layers() -> None:
    plain = planned(accelerated=False, recompute="layers")
    found, _ = within(planned(accelerated=False), plain.lora.memory.peak_bytes)
    assert found.job.recompute == "layers"


def test_settings_that_exclude_each_other() -> None:
    assert recomputed("none", False, None, True) == "none"
    assert recomputed("layers", True, None, False) == recomputed("none", True, None, True) == "layers"
    assert recomputed("none", False, "1GB", True) == "none"
    for words, message in (
        (
            ("feed-forward", True, None, True),
            "gradient_checkpointing and recompute=feed-forward are mutually exclusive",
        ),
        (("layers", False, "1GB", True), "memory_budget and recompute=layers are mutually exclusive"),
        (("none", True, "1GB", True), "memory_budget and recompute=layers are mutually exclusive"),
        (("feed-forward", False, None, False), "recompute=feed-forward needs accelerated forward passes"),
    ):
        with pytest.raises(ConfigError, match=message):
            recomputed(*words)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="recompute is 'all'; it must be one of none, feed-forward, layers"):
        Job(recompute="all")
