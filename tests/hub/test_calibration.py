import dataclasses

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.hub import Calibration, Units, calibrate, calibration, choose_dtype, chosen_by_units
from lorakit.hub.calibration import chosen_by_speed, units_of_cpu, units_of_gpu

FAST = Calibration(3e11, 1e11, 2e10, 1.9, "cpu", 2)
SLOW = dataclasses.replace(FAST, bf16_flops_per_second=5e10)


def test_this_machine_is_measured_and_no_random_number_is_drawn() -> None:
    before = torch.random.get_rng_state()
    measured = calibrate()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert measured.seconds < 20  # less than one on a free machine; tests may share theirs
    assert min(measured.bf16_flops_per_second, measured.fp32_flops_per_second, measured.copy_bytes_per_second) > 1e6
    assert measured.fp16_flops_per_second is None
    assert choose_dtype("auto", measured=measured).dtype in ("bfloat16", "float32")


def test_a_rate_is_that_of_the_fastest_run_within_a_fifth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = 0.0, iter((0.05, 0.02, 0.01, *[0.03] * 100))

    def work() -> torch.Tensor:
        nonlocal now
        now += next(taken)
        return torch.empty(0)

    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now)
    assert calibration._fastest(work, "cpu") == pytest.approx(0.01)
    assert 0.2 <= now < 0.25


@pytest.mark.parametrize(
    ("units", "factor", "dtype", "words"),
    [
        (units_of_gpu((9, 0)), None, "bfloat16", "compute capability 9.0"),
        (units_of_gpu((8, 0)), None, "bfloat16", "compute capability 8.0"),
        (units_of_gpu((7, 5)), None, "float16", "compute capability 7.5; bf16 units need 8.0"),
        (units_of_cpu(("avx2", "avx512f")), None, "float32", "no bf16 units (amx_bf16, avx512_bf16, bf16)"),
        (units_of_cpu(("avx512f", "avx512_bf16", "amx_bf16")), 6.0, "bfloat16", "(amx_bf16, avx512_bf16), and bf16"),
        (units_of_cpu(("avx512f", "avx512_bf16")), 0.5, "float32", "(avx512_bf16), and bf16 matmuls are 0.5x as fast"),
        (units_of_cpu(()), 1.21, "bfloat16", "1.2x as fast as fp32 (needed for bfloat16: 1.2x)"),
        (units_of_cpu(()), 1.19, "float32", "unknown"),
    ],
)
def test_the_units_of_a_device_or_else_its_speed_select_the_dtype(
    units: Units, factor: float | None, dtype: str, words: str
) -> None:
    found = chosen_by_units(units)
    assert (found is None) == (factor is not None)
    choice = found or chosen_by_speed(units, factor or 0.0)
    assert choice.dtype == dtype and choice.reason.startswith(f"{dtype}: ") and words in choice.reason


def test_the_dtype_comes_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "units_of", lambda device: units_of_cpu(("avx512_bf16",)))
    assert choose_dtype("auto", measured=FAST).dtype == "bfloat16"
    assert choose_dtype("auto", measured=SLOW).dtype == "float32"
    monkeypatch.setattr(calibration, "units_of", lambda device: units_of_gpu((7, 0)))
    assert choose_dtype("auto", measured=FAST).dtype == "float16"
    assert choose_dtype("float32", measured=FAST).reason == "float32, as requested."
    with pytest.raises(ConfigError, match="dtype is 'int8'; it must be one of auto, bfloat16, float16, float32"):
        choose_dtype("int8")


def test_the_rate_of_fp16_is_measured_or_that_of_fp32() -> None:
    assert FAST.flops_per_second("float16", tuned=True) == 1e11
    with_fp16 = dataclasses.replace(FAST, fp16_flops_per_second=2e11)
    assert with_fp16.flops_per_second("float16", tuned=False) == 2e11
    slow = dataclasses.replace(FAST, fp16_flops_per_second=1e9)
    assert slow.flops_per_second("float16", tuned=True) == pytest.approx(0.85e11)
    assert slow.upcasts("float16", tuned=True) and not slow.upcasts("float16", tuned=False)


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
