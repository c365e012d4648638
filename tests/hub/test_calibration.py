import dataclasses

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.hub import Calibration, calibrate, choose_dtype

FAST = Calibration(3e11, 1e11, 2e10, 1.9, "cpu", 2)
SLOW = dataclasses.replace(FAST, bf16_flops_per_second=5e10)


def test_this_machine_is_measured_in_about_two_seconds_and_no_random_number_is_drawn() -> None:
    before = torch.random.get_rng_state()
    measured = calibrate()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert measured.seconds < 20  # about two on a free machine; tests may share theirs
    assert min(measured.bf16_flops_per_second, measured.fp32_flops_per_second, measured.copy_bytes_per_second) > 1e6
    assert measured.dtype == choose_dtype("auto", measured).dtype


def test_the_dtype_comes_with_its_reason() -> None:
    assert choose_dtype("auto", FAST).dtype == "bfloat16"
    assert choose_dtype("auto", FAST).reason == (
        "bfloat16: bf16 matmuls are 3.0x as fast as fp32 (needed for bfloat16: 1.2x)."
    )
    assert choose_dtype("auto", SLOW).dtype == "float32"
    assert dataclasses.replace(FAST, bf16_flops_per_second=1.19e11).dtype == "float32"
    assert dataclasses.replace(FAST, bf16_flops_per_second=1.21e11).dtype == "bfloat16"
    assert choose_dtype("auto", SLOW).reason == (
        "float32: bf16 matmuls are 0.5x as fast as fp32 (needed for bfloat16: 1.2x)."
    )
    assert choose_dtype("float32", FAST).reason == "float32, as requested."
    with pytest.raises(ConfigError, match="dtype is 'int8'; it must be one of auto, bfloat16, float32"):
        choose_dtype("int8")


def test_the_line_that_is_printed() -> None:
    assert FAST.line() == (
        "Measured cpu (2 threads) in 1.9 s: matmul 300 GFLOP/s in bf16, 100 GFLOP/s in fp32; copy 20.0 GB/s."
    )


@pytest.mark.parametrize(
    ("bf16", "device", "tuned", "wanted"),
    [
        (3e11, "cpu", True, 3e11),
        (0.5e11, "cpu", True, 0.85e11),
        (0.5e11, "cpu", False, 0.5e11),
        (5e10, "cuda", True, 5e10),
    ],
)
def test_bf16_that_is_slow_goes_through_fp32_on_a_processor(
    bf16: float, device: str, tuned: bool, wanted: float
) -> None:
    measured = Calibration(bf16, 1e11, 2e10, 1.9, device, 2)
    assert measured.flops_per_second("bfloat16", tuned=tuned) == pytest.approx(wanted)
    assert measured.flops_per_second("float32", tuned=tuned) == 1e11
