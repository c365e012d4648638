"""Choose the training dtype, and measure in less than a second how fast this machine multiplies and copies.

The units of a device determine the dtype where they can: a GPU runs bf16 or fp16 on units for it, and a processor
without bf16 units runs fp32. On other processors, bf16 matmuls may be six times as fast as fp32 matmuls, twice as fast,
or slower, so a measurement decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.choices import DTYPES
from lorakit.errors import ConfigError, UsageError
from lorakit.machine import BF16_UNITS, this_machine
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
"""Fraction of the fp32 rate reached if 16-bit operands are upcast to fp32 (`benchmarks/bench_products.py`)."""

BF16_CAPABILITY = (8, 0)
"""Compute capability from which CUDA GPUs have bf16 units."""

_BUDGET_SECONDS = 0.2
"""Duration of each measurement; rates vary as much with 0.6 s, because load lasts longer."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The measured speed of a device.

    Attributes:
        bf16_flops_per_second: Rate of a bf16 matmul; one multiply-add counts as two FLOPs.
        copy_bytes_per_second: Bytes read plus bytes written per second.
        seconds: Duration of the measurement.
        threads: Number of CPU threads that torch uses.
        fp16_flops_per_second: Rate of an fp16 matmul, or None if it was not measured.
        int8_flops_per_second: Rate of a linear layer in int8, with the quantization of its input, or None.
    """

    bf16_flops_per_second: float
    fp32_flops_per_second: float
    copy_bytes_per_second: float
    seconds: float
    device: str
    threads: int
    fp16_flops_per_second: float | None = None
    int8_flops_per_second: float | None = None

    @property
    def factor(self) -> float:
        """The speed of bf16 matmuls relative to fp32 matmuls."""
        return self.bf16_flops_per_second / self.fp32_flops_per_second

    def flops_per_second(self, dtype: str, *, tuned: bool) -> float:
        """Return the matmul rate to expect in a run; that of fp32 for "float16" without a measurement.

        Args:
            dtype: Any name other than "float32", "fp32" and "float16" means bf16.
            tuned: Whether kernels are autotuned by shape (`lorakit.speed.choose`), so that 16-bit operands are upcast
                to fp32 on a CPU when that is faster.
        """
        if dtype in ("float32", "fp32"):
            return self.fp32_flops_per_second
        widened = THROUGH_FP32 * self.fp32_flops_per_second if tuned and self.device == "cpu" else 0.0
        rates = {"float16": self.fp16_flops_per_second or self.fp32_flops_per_second}
        return max(rates.get(dtype, self.bf16_flops_per_second), widened)

    def upcasts(self, dtype: str, *, tuned: bool) -> bool:
        """Return whether a run upcasts the operands of its matmuls to fp32, because that is faster."""
        return self.flops_per_second(dtype, tuned=tuned) > self.flops_per_second(dtype, tuned=False)

    def line(self) -> str:
        """Return the results as one line of text."""
        bf16, fp32 = (format_quantity(r, "FLOP/s") for r in (self.bf16_flops_per_second, self.fp32_flops_per_second))
        where = f"cpu ({format_count(self.threads, 'thread')})" if self.device == "cpu" else self.device
        rate = self.int8_flops_per_second
        int8 = "" if rate is None else f", {format_quantity(rate, 'FLOP/s')} in int8"
        return (
            f"Measured {where} in {format_seconds(self.seconds)}: matmul {bf16} in bf16, {fp32} in fp32{int8}; "
            f"copy {format_bytes(self.copy_bytes_per_second)}/s."
        )


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A dtype ("bfloat16", "float16" or "float32"), and a message that explains the choice."""

    dtype: str
    reason: str


def calibrate(device: str | torch.device = "cpu", *, with_fp16: bool = False, with_int8: bool = False) -> Calibration:
    """Measure how fast a device runs matmuls of a typical training shape in bf16 and fp32, and how fast it copies
    memory.

    Each rate is that of the fastest of several runs. fp16 is always measured on a GPU.
    """
    import torch

    began = time.perf_counter()
    with_fp16 = with_fp16 or torch.device(device).type == "cuda"
    return Calibration(
        bf16_flops_per_second=_product_rate(device, torch.bfloat16),
        fp32_flops_per_second=_product_rate(device, torch.float32),
        copy_bytes_per_second=_copy_rate(device),
        fp16_flops_per_second=_product_rate(device, torch.float16) if with_fp16 else None,
        int8_flops_per_second=_int8_rate(device) if with_int8 else None,
        seconds=time.perf_counter() - began,
        device=str(device),
        threads=torch.get_num_threads(),
    )


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a device that multiply matrices in 16 bits, and a clause that names them.

    `has_bf16` is None if unknown; on a CUDA GPU (`is_gpu`), fp16 is at least as fast as fp32.
    """

    has_bf16: bool | None
    text: str
    is_gpu: bool = False


def units_of(device: str | torch.device) -> Units:
    """Return the 16-bit units of a device."""
    import torch

    where = torch.device(device)
    if where.type == "cuda":
        return units_of_gpu(torch.cuda.get_device_capability(where))
    return units_of_cpu(this_machine().features) if where.type == "cpu" else Units(None, "the units are unknown")


def units_of_gpu(capability: tuple[int, int]) -> Units:
    """Return the 16-bit units of a CUDA GPU, from its compute capability such as (8, 0)."""
    has_bf16 = capability >= BF16_CAPABILITY
    needed = "" if has_bf16 else f"; bf16 units need {_version(BF16_CAPABILITY)}"
    return Units(has_bf16, f"the GPU has compute capability {_version(capability)}{needed}", is_gpu=True)


def units_of_cpu(features: Sequence[str]) -> Units:
    """Return the 16-bit units of a processor, from its entries of `lorakit.machine.FEATURES`; empty if unknown."""
    if not features:
        return Units(None, "the processor's units are unknown")
    present = [name for name in BF16_UNITS if name in features]
    if present:
        return Units(True, f"the processor has bf16 units ({', '.join(present)})")
    return Units(False, f"the processor has no bf16 units ({', '.join(BF16_UNITS)})")


def choose_dtype(
    requested: str, device: str | torch.device = "cpu", measured: Calibration | None = None
) -> DtypeChoice:
    """Return the dtype for the base on a device; "auto" uses or makes a measurement if the units do not decide.

    Raises:
        ConfigError: `requested` is not in `lorakit.choices.DTYPES`.
    """
    if requested not in DTYPES:
        raise ConfigError.of("dtype", requested, allowed=DTYPES)
    if requested != "auto":
        return DtypeChoice(requested, f"{requested}, as requested.")
    units = units_of(device)
    return chosen_by_units(units) or chosen_by_speed(units, (measured or calibrate(device)).factor)


def chosen_by_units(units: Units) -> DtypeChoice | None:
    """Return the dtype that "auto" selects if the units of a device alone determine it, else None."""
    if units.is_gpu:
        dtype = "bfloat16" if units.has_bf16 else "float16"
    elif units.has_bf16 is False:
        dtype = "float32"
    else:
        return None
    return DtypeChoice(dtype, f"{dtype}: {units.text}.")


def expected_dtype(features: Sequence[str]) -> DtypeChoice | None:
    """Return the dtype that "auto" should select on a processor with these features; None if it must be measured."""
    units = units_of_cpu(features)
    if BF16_UNITS[0] in features:
        return DtypeChoice("bfloat16", f"bfloat16: {units.text}; a run measures them.")
    return chosen_by_units(units)


def chosen_by_speed(units: Units, factor: float) -> DtypeChoice:
    """Return the dtype that "auto" selects by `Calibration.factor`, the speed of bf16 matmuls relative to fp32.

    Processors with bf16 dot products but no matrix units (avx512_bf16 without amx_bf16) often run bf16 more slowly.
    """
    dtype = "bfloat16" if factor >= NEEDED_FACTOR else "float32"
    times = f"bf16 matmuls are {factor:.1f}x as fast as fp32 (needed for bfloat16: {NEEDED_FACTOR}x)"
    return DtypeChoice(dtype, f"{dtype}: {units.text}, and {times}.")


def _version(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def _product_rate(device: str | torch.device, dtype: torch.dtype) -> float:
    """Return the rate of `x W^T`, the matmul of a linear layer, in FLOPs per second."""
    import torch

    x, weight = _operands(device, dtype)
    return _rate(lambda: torch.nn.functional.linear(x, weight), device)


def _int8_rate(device: str | torch.device) -> float:
    """Return the rate of a linear layer in int8 on bf16 inputs, in FLOPs per second."""
    import torch

    from lorakit.ops.int8 import int8_linear
    from lorakit.ops.int8_weight import input_scales, quantize_weight

    x, W = _operands(device, torch.bfloat16)
    weight = quantize_weight(W, *input_scales(x.abs().amax(0), [W]))
    return _rate(lambda: int8_linear(x, weight), device)


def _operands(device: str | torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an input (rows, in) and a weight (out, in) of the sizes in `SHAPE`."""
    import torch

    rows, inner, outer = SHAPE
    generator = torch.Generator().manual_seed(0)  # a separate generator leaves the caller's random state unchanged
    x = torch.randn(rows, inner, generator=generator).to(device, dtype)
    return x, torch.randn(outer, inner, generator=generator).to(device, dtype)


def _rate(matmul: Callable[[], torch.Tensor], device: str | torch.device) -> float:
    import torch

    rows, inner, outer = SHAPE
    with torch.no_grad():
        return 2 * rows * inner * outer / _fastest(matmul, device)


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


def pick_device(word: str) -> torch.device:
    """Return the device that "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:N" or "mps" selects.

    Raises:
        UsageError: The device is not available on this machine.
    """
    import torch

    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device, problem = torch.device(word), ""
    except RuntimeError:
        raise UsageError.of("device", word, "auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        problem = format_count(count, "CUDA device") if device.index >= count else ""
    elif device.type == "mps" and not torch.backends.mps.is_available():
        problem = "no MPS device"
    if problem:
        text = f"device is {word!r}, but torch {torch.__version__} finds {problem}."
        raise UsageError(text, what=word, field="device")
    return device
