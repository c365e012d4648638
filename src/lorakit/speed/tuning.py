"""Autotuning: measure which kernels are fastest for a model's shapes on this machine, and cache the results on disk.

`choose` takes the measurements, and `lorakit.ops.choices.activate` activates the results. Only attention and matmuls
with frozen base weights are measured, on a CPU, if they are large enough for the choice to matter.

All machines that share a cache directory share one file. If it is missing, damaged or not writable, shapes are measured
again. Of two processes that write at the same time, one's results may be lost, but the file remains valid.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.architectures.shapes import config_value
from lorakit.caches import AUTOTUNING, versions
from lorakit.machine import Machine, library_variables, this_machine
from lorakit.ops import attention, choices
from lorakit.ops.attention_pattern import Method, Pattern
from lorakit.ops.kernels import compiled
from lorakit.speed.linear import frozen_linear
from lorakit.speed.loss import output_head
from lorakit.tables import format_count, format_seconds


def read(folder: Path | None = None) -> dict[str, int]:
    """Read the results, shape name -> fastest method, for this machine, thread count and torch version."""
    return _of_machine(_machines(folder))


def save(results: Mapping[str, int], folder: Path | None = None) -> str:
    """Add results to the cache file; return why they could not be saved, or ""."""
    machines = _machines(folder)
    machines[machine()] = {**_of_machine(machines), **results}
    return AUTOTUNING.write({"machines": machines}, _path(folder))


def machine() -> str:
    """Return a key of what affects speed: processor and instruction sets, threads, versions, and compiled kernels."""
    here, limit = this_machine(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    libraries = library_variables().items()
    return AUTOTUNING.key(
        processor=here.cpu,
        instructions=[*here.features, *([f"at most {limit}"] if limit else []), *map("=".join, libraries)],
        threads=torch.get_num_threads(),
        kernels=compiled.kernels() is not None,
        versions=versions(("torch",)),
    )


def _path(folder: Path | None) -> Path | None:
    return None if folder is None else folder / AUTOTUNING.place


def _machines(folder: Path | None) -> dict[str, Any]:
    return dict(AUTOTUNING.read(_path(folder)).get("machines", {}))


def _of_machine(machines: Mapping[str, Any]) -> dict[str, int]:
    results = machines.get(machine())
    known = results.items() if isinstance(results, dict) else ()
    return {name: method for name, method in known if type(method) is int}  # `type` excludes bool


GAIN = 0.1
"""Fraction by which a method must reduce the best time so far; a smaller difference may be noise."""

ROUNDS = 3
"""Number of trials that a method must win, or lose, against the best so far, so that one disturbance does not decide.
"""

FEWEST_FLOPS, MOST_FLOPS = 1 << 27, 1 << 33
"""Smallest and largest operation to measure, in FLOPs: others take hardly any time, or run at full speed."""

AT_ONCE = 1024
"""Minimum total number of tokens in a batch for which attention is measured."""

BUSY = 1.5
"""Load (running processes per core, averaged over the last minute) above which a machine is considered busy."""

IN_FP32_ROWS = 512
"""Number of rows in the matmul that is measured to decide whether matmuls with a weight run in fp32."""

BUDGET_SECONDS = 3.0
"""Time in seconds after which measuring stops. The remaining shapes are left for a later run."""


@dataclass(frozen=True)
class TuningTask:
    """A measurement: a shape, and the methods that are available for it.

    Attributes:
        name: Name of the shape in `lorakit.ops.choices`.
        others: Other methods in the order in which they are tried; the first one that is not faster ends the search.
        prepare: Creates data and returns a function that runs a given method on them.
        unless: Name of a shape that is measured earlier; unless its method is 0, this task is skipped.
    """

    name: str
    default: int
    others: tuple[int, ...]
    prepare: Callable[[], Callable[[int], Tensor | None]]
    unless: str = ""


@dataclass(frozen=True)
class TuningResult:
    """Result of `choose`: shape name -> method that is faster than the default. `measured` shapes were not read from
    the cache; `skipped` ones were not measured for lack of time or a busy machine.
    """

    choices: Mapping[str, int]
    measured: int = 0
    seconds: float = 0.0
    save_error: str = ""
    skipped: int = 0

    def __str__(self) -> str:
        later = f"{format_count(self.skipped, 'shape')} left for a later run." if self.skipped else ""
        if not self.measured:
            return f"Autotuning: the machine is busy; {later}" if later else ""
        measured = f"{format_count(self.measured, 'shape')} in {format_seconds(self.seconds)}"
        text = f"Autotuning: {measured}, {format_count(len(self.choices), 'non-default kernel')}."
        text += f" Not saved ({self.save_error}), so the next run measures again." if self.save_error else ""
        return text + (f" Out of time; {later}" if later else "")


def choose(
    model: nn.Module,
    tokens: int,
    longest: int,
    *,
    folder: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TuningResult:
    """Find the fastest methods for a model's shapes, from saved results or by measuring for up to about three seconds.

    Global random generators are not affected. The result is empty for models that are not in CPU memory, for weights
    without data (fake tensors), and during compilation. On a busy machine, nothing is measured. `tokens` are those of
    the largest batch, `longest` those of the longest sequence; `folder` has the saved results, by default lorakit's
    cache.
    """
    is_fake = torch.compiler.is_compiling() or type(torch.empty(0, device="cpu")) is not Tensor
    tasks = [] if is_fake else [*matmul_tasks(model, tokens), *attention_tasks(model, longest)]
    if not tasks:
        return TuningResult({})
    began, results = clock(), read(folder)
    unknown = [q for q in tasks if results.get(q.name) not in (q.default, *q.others)]
    fresh: dict[str, int] = {}
    if unknown and not is_busy(this_machine()):
        for task in unknown:
            if clock() - began > BUDGET_SECONDS:
                break
            if not results.get(task.unless):
                results[task.name] = fresh[task.name] = fastest(task, clock)
    seconds = clock() - began
    save_error = save(fresh, folder) if fresh else ""
    chosen = {q.name: results[q.name] for q in tasks if results.get(q.name, q.default) in q.others}
    left = [q for q in unknown if q.name not in fresh and not results.get(q.unless)]
    return TuningResult(chosen, len(fresh), seconds, save_error, len(left))


def is_busy(machine: Machine) -> bool:
    """Return whether the machine is too busy for useful measurements."""
    return machine.load is not None and machine.load > BUSY * machine.cores


def fastest(task: TuningTask, clock: Callable[[], float]) -> int:
    """Try a task's methods in order until one fails to beat the best method so far, and return the best method."""
    with torch.no_grad():
        run, best = task.prepare(), task.default
        for other in task.others:
            if not _wins(run, other, best, clock):
                break
            best = other
    return best


def _wins(run: Callable[[int], Tensor | None], other: int, best: int, clock: Callable[[], float]) -> bool:
    for method in (best, other):  # warm-up run, because the first call to a library may include setup
        run(method)
    won = lost = 0
    while won < ROUNDS and lost < ROUNDS:
        taken = {}
        for method in (best, other):
            began = clock()
            run(method)
            taken[method] = clock() - began
        gains = taken[other] < (1 - GAIN) * taken[best]  # if the clock is too coarse, both times are 0
        won, lost = won + gains, lost + (not gains)
    return won == ROUNDS


def matmul_tasks(model: nn.Module, tokens: int) -> Iterator[TuningTask]:
    """Yield tasks for the matmuls of frozen weights with up to `tokens` tokens, those about fp32 first."""
    counts = [rows for fewer, rows in itertools.pairwise((choices.SLICES[0], *choices.ROWS)) if fewer < tokens]
    sides = [right for W in _weights(model) for right in (W, W.t())]
    tasks: dict[str, TuningTask] = {}
    for right in sides:
        if right.dtype in choices.NARROW and tokens >= choices.FEWEST_IN_FP32:
            name, part = choices.fp32_name(right), right[: choices.BLOCK, : choices.BLOCK]
            tasks[name] = TuningTask(name, 0, (1,), partial(_through_fp32, part))
    for right, rows in itertools.product(sides, counts):
        name = choices.matmul_name(rows, right)
        if FEWEST_FLOPS <= 2 * rows * right.numel() <= MOST_FLOPS:
            tasks[name] = TuningTask(name, 0, choices.SLICES, partial(_product, rows, right), choices.fp32_name(right))
    yield from tasks.values()


def attention_tasks(model: nn.Module, longest: int) -> Iterator[TuningTask]:
    """Yield tasks for a model's causal attention over sequences of up to `longest` tokens."""
    config = getattr(model, "config", None)
    heads = config_value(config, "num_attention_heads")
    dtype = next((W.dtype for W in _weights(model)), None)
    if config is None or not isinstance(heads, int) or dtype is None:
        return
    shared = config_value(config, "num_key_value_heads") or heads
    width = config_value(config, "head_dim") or config.hidden_size // heads
    for length in choices.LENGTHS:
        sizes = (max(1, AT_ONCE // length), heads, length, width)
        default = int(length >= attention.FLASH_FROM)
        if length <= longest and FEWEST_FLOPS <= 2 * math.prod(sizes) * length <= MOST_FLOPS:
            name = choices.attention_name((heads, shared, width), dtype, True, length)
            methods: tuple[Method, Method] = ("matmul", "flash")
            if dtype in choices.NARROW:
                of_fp32 = partial(_attention, sizes, shared, dtype, (methods[default], "matmul_fp32"))
                yield TuningTask(choices.fp32_choice(name), 0, (1,), of_fp32)
            of_flash = partial(_attention, sizes, shared, dtype, methods)
            yield TuningTask(name, default, (1 - default,), of_flash, choices.fp32_choice(name))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the frozen weights (out, in) or (in, out) of a model's linear modules, if they are in CPU memory."""
    for module in model.modules():
        base = frozen_linear(module)
        if base is not None and isinstance(base.W, Tensor) and base.W.device.type == "cpu":
            yield base.W.detach()
    head = output_head(model)  # `frozen_linear` does not recognize an accelerated head
    W = getattr(head, "weight", None)
    if type(W) is nn.Parameter and W.dim() == 2 and not W.requires_grad and W.device.type == "cpu":
        yield W.detach()


def _product(rows: int, right: Tensor) -> Callable[[int], Tensor]:
    x, out = _rows_of(rows, right)
    return lambda size: choices.matmul_in_slices(x, right, size or rows, out)


def _through_fp32(right: Tensor) -> Callable[[int], Tensor]:
    x, out = _rows_of(IN_FP32_ROWS, right)
    return lambda method: choices.matmul_in_fp32(x, right, out) if method else torch.mm(x, right, out=out)


def _rows_of(rows: int, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return an input (rows, in) for a matmul with `right` (in, out), and an output buffer (rows, out)."""
    x = torch.ones(rows, right.shape[0], dtype=right.dtype, device="cpu")
    return x, torch.empty(rows, right.shape[1], dtype=right.dtype, device="cpu")


def _attention(
    sizes: tuple[int, int, int, int], shared: int, dtype: torch.dtype, methods: tuple[Method, Method]
) -> Callable[[int], None]:
    """Return a function that runs forward and backward of attention for q (B, H, T, D) of the given sizes."""
    batch, heads, length, width = sizes
    q = torch.ones(batch, length, heads, width, dtype=dtype, device="cpu").transpose(1, 2)
    k, v = (torch.ones(batch, length, shared, width, dtype=dtype, device="cpu").transpose(1, 2) for _ in range(2))

    def run(method: int) -> None:
        pattern = Pattern(method=methods[method])
        out, sums, dropped = attention.forward(q, k, v, pattern)
        attention.backward(out, (q, k, v), (out, sums, dropped), pattern)

    return run
