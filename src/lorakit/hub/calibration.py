"""Measure, in about two seconds, how fast this machine multiplies matrices and copies memory.

Depending on the processor, bf16 matmuls may be six times as fast as fp32 matmuls, twice as fast, or slower. The choice
of training dtype and the time estimates in plans are therefore based on measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError
from lorakit.tables import format_bytes, format_count, format_quantity, format_seconds

if TYPE_CHECKING:
    import torch

SHAPE = (1024, 1024, 2048)
"""Rows (tokens in a batch), input width and output width of the measured matmul, as in a small model's MLP."""

COPIED_BYTES = 1 << 26
"""Number of bytes copied per measurement, chosen to exceed the size of typical processor caches."""

NEEDED_FACTOR = 1.2
"""Minimum speedup of bf16 over fp32 matmuls needed to choose bf16; less does not justify the rounding error."""

THROUGH_FP32 = 0.85
"""Fraction of the fp32 rate reached if bf16 operands are upcast to fp32 (`benchmarks/bench_products.py`)."""

CHOICES = ("auto", "bfloat16", "float32")
"""Allowed values of the training dtype."""

_BUDGET_SECONDS = 0.6


@dataclass(frozen=True, slots=True)
class Calibration:
    """The measured speed of a device.

    Attributes:
        bf16_flops_per_second: Rate of a bf16 matmul; one multiply-add counts as two FLOPs.
        fp32_flops_per_second: Rate of an fp32 matmul.
        copy_bytes_per_second: Bytes read plus bytes written per second.
        seconds: Duration of the measurement.
        device: The measured device.
        threads: Number of CPU threads that torch uses.
    """

    bf16_flops_per_second: float
    fp32_flops_per_second: float
    copy_bytes_per_second: float
    seconds: float
    device: str
    threads: int

    @property
    def factor(self) -> float:
        """The speed of bf16 matmuls relative to fp32 matmuls."""
        return self.bf16_flops_per_second / self.fp32_flops_per_second

    @property
    def dtype(self) -> str:
        """The dtype that "auto" selects: bf16 if bf16 matmuls are at least `NEEDED_FACTOR` times as fast, else fp32."""
        return "bfloat16" if self.factor >= NEEDED_FACTOR else "float32"

    def flops_per_second(self, dtype: str, *, tuned: bool) -> float:
        """Return the matmul rate to expect in a run.

        Args:
            dtype: "float32" or "fp32"; any other name means bf16.
            tuned: Whether kernels are autotuned by shape (`lorakit.speed.choose`). If so, bf16 operands are upcast to
                fp32 on a CPU when that is faster.
        """
        if dtype in ("float32", "fp32"):
            return self.fp32_flops_per_second
        widened = THROUGH_FP32 * self.fp32_flops_per_second if tuned and self.device == "cpu" else 0.0
        return max(self.bf16_flops_per_second, widened)

    def upcasts(self, dtype: str, *, tuned: bool) -> bool:
        """Return whether a run upcasts the operands of its matmuls to fp32, because that is faster.

        Args:
            dtype: As in `flops_per_second`.
            tuned: As in `flops_per_second`.
        """
        return self.flops_per_second(dtype, tuned=tuned) > self.flops_per_second(dtype, tuned=False)

    def line(self) -> str:
        """Return the results as one line of text."""
        bf16, fp32 = (format_quantity(r, "FLOP/s") for r in (self.bf16_flops_per_second, self.fp32_flops_per_second))
        where = f"cpu ({format_count(self.threads, 'thread')})" if self.device == "cpu" else self.device
        return (
            f"Measured {where} in {format_seconds(self.seconds)}: matmul {bf16} in bf16, {fp32} in fp32; "
            f"copy {format_bytes(self.copy_bytes_per_second)}/s."
        )


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A dtype and the reason for choosing it.

    Attributes:
        dtype: "bfloat16" or "float32".
        reason: Message that explains the choice.
    """

    dtype: str
    reason: str


def calibrate(device: str | torch.device = "cpu") -> Calibration:
    """Measure how fast a device runs bf16 and fp32 matmuls of a typical training shape, and how fast it copies memory.

    Args:
        device: Device to measure.

    Returns:
        The rates, each computed from the fastest of several runs to limit the effect of other load on the machine.
    """
    import torch

    began = time.perf_counter()
    return Calibration(
        bf16_flops_per_second=_product_rate(device, torch.bfloat16),
        fp32_flops_per_second=_product_rate(device, torch.float32),
        copy_bytes_per_second=_copy_rate(device),
        seconds=time.perf_counter() - began,
        device=str(device),
        threads=torch.get_num_threads(),
    )


def choose_dtype(requested: str, calibration: Calibration | None = None) -> DtypeChoice:
    """Choose the dtype for the base's weights and computation.

    Args:
        requested: "auto", "bfloat16" or "float32".
        calibration: Result of `calibrate`; if None, "auto" measures the CPU.

    Returns:
        The dtype and the reason for it.

    Raises:
        ConfigError: `requested` is not in `CHOICES`.
    """
    if requested not in CHOICES:
        raise ConfigError.of("dtype", requested, allowed=CHOICES)
    if requested != "auto":
        return DtypeChoice(requested, f"{requested}, as requested.")
    measured = calibration or calibrate()
    times = f"bf16 matmuls are {measured.factor:.1f}x as fast as fp32 (needed for bfloat16: {NEEDED_FACTOR}x)"
    return DtypeChoice(measured.dtype, f"{measured.dtype}: {times}.")


def _product_rate(device: str | torch.device, dtype: torch.dtype) -> float:
    """Return the rate of `x W^T`, the matmul of a linear layer, in FLOPs per second."""
    import torch

    rows, inner, outer = SHAPE
    generator = torch.Generator().manual_seed(0)  # a separate generator leaves the caller's random state unchanged
    x = torch.randn(rows, inner, generator=generator).to(device, dtype)
    weight = torch.randn(outer, inner, generator=generator).to(device, dtype)
    with torch.no_grad():
        seconds = _fastest(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * rows * inner * outer / seconds


def _copy_rate(device: str | torch.device) -> float:
    import torch

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], torch.Tensor], device: str | torch.device) -> float:
    """Return the time, in seconds, of the fastest run within the time budget; the first run is a warm-up."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(torch.device(device).type)
    best, began = float("inf"), time.perf_counter()
    runs = 0
    while runs < 2 or time.perf_counter() - began < _BUDGET_SECONDS:
        start = time.perf_counter()
        work()
        if wait:
            wait()
        if runs:
            best = min(best, time.perf_counter() - start)
        runs += 1
    return best
