"""The answers of `lorakit.speed.tuning` on disk: one file for all machines that share a cache folder.

A file that is missing, damaged or not to be written costs a measurement and nothing else. Of two processes that write
at once, one may lose what it measured; the file is always whole.

Which way is faster on this machine, by shape: measured once for the shapes of a model, and kept on disk.

`choose` asks; `lorakit.ops.choices.acting` makes the answers act. Only products with the base's frozen weights and
attention are asked about, on a CPU, from a size where it can matter. Nothing here runs unless it is called.
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

from lorakit import __version__, durable
from lorakit.errors import AdapterFileError, DiskError
from lorakit.machine import Machine, cache_directory, this_machine
from lorakit.ops import attention
from lorakit.ops.attention_pattern import Pattern, Way
from lorakit.ops.choices import (
    BLOCK,
    FEWEST_IN_FP32,
    LENGTHS,
    NARROW,
    ROWS,
    SLICES,
    attention_name,
    fp32_name,
    in_fp32,
    in_slices,
    product_name,
    through_fp32,
)
from lorakit.ops.kernels import compiled
from lorakit.speed.linear import frozen_linear
from lorakit.speed.output_head import output_head
from lorakit.tables import format_count, format_seconds

FILE = "choices.json"
FORMAT = 1


def read(folder: Path | None = None) -> dict[str, int]:
    """What was measured on this machine, with its threads and torch.

    Args:
        folder: Where the file is; None for lorakit's cache.

    Returns:
        Name of a shape -> the way that is best; nothing where there is no such file.
    """
    try:
        path = _path(folder)
    except DiskError:
        return {}
    return _of_machine(_machines(path).get(machine()))


def keep(answers: Mapping[str, int], folder: Path | None = None) -> str:
    """Put answers beside those that stand there.

    Args:
        answers: Name of a shape -> way.
        folder: As of `read`.

    Returns:
        Why it was not possible, or "".
    """
    try:
        path = _path(folder)
        machines = _machines(path)
        machines[machine()] = {**_of_machine(machines.get(machine())), **answers}
        durable.write_json(path, {"format": FORMAT, "machines": machines})
    except DiskError as cause:
        return str(cause).removesuffix(".")
    return ""


def machine() -> str:
    """What decides how fast a way is here: processor, its instructions, threads, torch, lorakit and its kernels."""
    here, limit = this_machine(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    instructions = " ".join((*here.features, *([f"at most {limit}"] if limit else [])))
    kernels = "compiled kernels" if compiled.kernels() is not None else "no kernels"
    libraries = f"torch {torch.__version__}; lorakit {__version__}, {kernels}"
    return f"{here.cpu}; {instructions}; {torch.get_num_threads()} threads; {libraries}"


def _path(folder: Path | None) -> Path:
    return (cache_directory() if folder is None else folder) / FILE


def _machines(path: Path) -> dict[str, Any]:
    try:
        content = durable.read_json(path)
    except AdapterFileError:
        return {}
    known = isinstance(content, dict) and content.get("format") == FORMAT
    machines = content.get("machines") if known else None
    return machines if isinstance(machines, dict) else {}


def _of_machine(answers: Any) -> dict[str, int]:
    if not isinstance(answers, dict):
        return {}
    return {name: way for name, way in answers.items() if isinstance(way, int) and not isinstance(way, bool)}


GAIN = 0.1
"""By how much of the usual way's time another one must be faster: below, the next measurement might say otherwise."""

ROUNDS = 3
"""Trials that another way has to win before the best so far has won as many: a disturbance decides nothing alone."""

FEWEST_FLOPS, MOST_FLOPS = 1 << 27, 1 << 33
"""Of what is measured. Less is over at once; more runs at full speed whichever way, and would take long to measure."""

AT_ONCE = 1024
"""Tokens of the attention that is measured, at least."""

BUSY = 1.5
"""Processes running for each core, in the mean of the last minute, above which a machine is busy."""

IN_FP32_ROWS = 512
"""Rows of the product that tells whether those of a weight go through fp32."""

BUDGET_SECONDS = 3.0
"""After so long the rest is left to a later run."""


@dataclass(frozen=True)
class Question:
    """A shape for which there are several ways.

    Attributes:
        name: Of the shape, as `lorakit.ops.choices` looks it up.
        usual: The way that is taken without a choice.
        others: Ways to try, each only where the one before was faster.
        prepare: Makes what runs a way, on numbers of its own.
        unless: A shape that is asked about before; where that goes another way than 0, nothing is asked.
    """

    name: str
    usual: int
    others: tuple[int, ...]
    prepare: Callable[[], Callable[[int], object]]
    unless: str = ""


@dataclass(frozen=True)
class Chosen:
    """What `choose` found.

    Attributes:
        choices: Name of a shape -> the way that is faster than the usual one; nothing where that is best.
        measured: Shapes that were measured now; the others' answers were on disk.
        seconds: How long that took.
        unkept: Why the answers could not be put on disk, or "".
        left: Shapes that were not measured, since the machine is busy or the time was up.
    """

    choices: Mapping[str, int]
    measured: int = 0
    seconds: float = 0.0
    unkept: str = ""
    left: int = 0

    def __str__(self) -> str:
        later = f"{format_count(self.left, 'shape')} left to a later run."
        if not self.measured:
            return f"Autotuning: the machine is busy; {later}" if self.left else ""
        unkept = f" Not saved ({self.unkept}), so the next run measures again." if self.unkept else ""
        return (
            f"Autotuning: {format_count(self.measured, 'shape')} in {format_seconds(self.seconds)}, "
            f"{format_count(len(self.choices), 'non-default kernel')}."
            + unkept
            + (f" Out of time; {later}" if self.left else "")
        )


def choose(
    model: nn.Module,
    tokens: int,
    longest: int,
    *,
    folder: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Chosen:
    """Find the faster ways for the shapes of a model: those on disk, and the others by trial, in some three seconds.

    Global random generators stay as they are. Nothing is found on other devices than a CPU, for weights without
    numbers, and while a compiler traces; on a busy machine nothing is measured.

    Args:
        model: A model, with or without adapters; it is not called.
        tokens: Of the largest batch.
        longest: Tokens of its longest sequence.
        folder: Where answers are kept; None for lorakit's cache.
        clock: Seconds, for tests.
    """
    if torch.compiler.is_compiling() or type(torch.empty(0, device="cpu")) is not Tensor:
        return Chosen({})
    asked = [*products(model, tokens), *attentions(model, longest)]
    if not asked:
        return Chosen({})
    began, answers = clock(), read(folder)
    unknown = [q for q in asked if answers.get(q.name) not in (q.usual, *q.others)]
    fresh: dict[str, int] = {}
    if unknown and not is_busy(this_machine()):
        for question in unknown:
            if clock() - began > BUDGET_SECONDS:
                break
            if not answers.get(question.unless):
                answers[question.name] = fresh[question.name] = answer(question, clock)
    seconds = clock() - began
    unkept = keep(fresh, folder) if fresh else ""
    acting = {q.name: answers[q.name] for q in asked if answers.get(q.name, q.usual) in q.others}
    left = [q for q in unknown if q.name not in fresh and not answers.get(q.unless)]
    return Chosen(acting, len(fresh), seconds, unkept, len(left))


def is_busy(machine: Machine) -> bool:
    """Whether so much else runs that measuring would tell little."""
    return machine.load is not None and machine.load > BUSY * machine.cores


def answer(question: Question, clock: Callable[[], float]) -> int:
    """The way that is faster than the usual one by `GAIN`, first in `ROUNDS` trials, or the usual one."""
    with torch.no_grad():
        run, best = question.prepare(), question.usual
        for other in question.others:
            if not _wins(run, other, best, clock):
                break
            best = other
    return best


def _wins(run: Callable[[int], object], other: int, best: int, clock: Callable[[], float]) -> bool:
    for way in (best, other):  # what a library makes at its first call does not count
        run(way)
    won = lost = 0
    while won < ROUNDS and lost < ROUNDS:
        taken = {}
        for way in (best, other):
            began = clock()
            run(way)
            taken[way] = clock() - began
        gains = taken[other] < (1 - GAIN) * taken[best]  # a clock too coarse to tell says 0 for both
        won, lost = won + gains, lost + (not gains)
    return won == ROUNDS


def products(model: nn.Module, tokens: int) -> Iterator[Question]:
    """The products of batches of up to so many tokens with the frozen weights of a model, forward and backward.

    Those that tell whether a weight goes through fp32 come first, of part of a large one.
    """
    counts = [rows for fewer, rows in itertools.pairwise((SLICES[0], *ROWS)) if fewer < tokens]
    sides = [right for W in _weights(model) for right in (W, W.t())]
    found: dict[str, Question] = {}
    for right in sides:
        if right.dtype in NARROW and tokens >= FEWEST_IN_FP32:
            part = right[:BLOCK, :BLOCK]
            found[fp32_name(right)] = Question(fp32_name(right), 0, (1,), partial(_through_fp32, part))
    for right, rows in itertools.product(sides, counts):
        name = product_name(rows, right)
        if FEWEST_FLOPS <= 2 * rows * right.numel() <= MOST_FLOPS:
            found[name] = Question(name, 0, SLICES, partial(_product, rows, right), fp32_name(right))
    yield from found.values()


def attentions(model: nn.Module, longest: int) -> Iterator[Question]:
    """Causal attention of a model, over sequences of up to so many tokens."""
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    dtype = next((W.dtype for W in _weights(model)), None)
    if not isinstance(heads, int) or dtype is None:
        return
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for length in LENGTHS:
        sizes = (max(1, AT_ONCE // length), heads, length, width)
        usual = int(length >= attention.FLASH_FROM)
        if length <= longest and FEWEST_FLOPS <= 2 * math.prod(sizes) * length <= MOST_FLOPS:
            name = attention_name((heads, shared, width), dtype, True, length)
            ways: tuple[Way, Way] = ("products", "flash")
            if dtype in NARROW:
                of_fp32 = partial(_attention, sizes, shared, dtype, (ways[usual], "products in fp32"))
                yield Question(through_fp32(name), 0, (1,), of_fp32)
            of_flash = partial(_attention, sizes, shared, dtype, ways)
            yield Question(name, usual, (1 - usual,), of_flash, through_fp32(name))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """The frozen weights (out, in) or (in, out) of a model's linear modules that lie in this machine's memory."""
    for module in model.modules():
        base = frozen_linear(module)
        if base is not None and base.W.device.type == "cpu":
            yield base.W.detach()
    head = output_head(model)  # an accelerated one is no plain linear module
    W = getattr(head, "weight", None)
    if type(W) is nn.Parameter and W.dim() == 2 and not W.requires_grad and W.device.type == "cpu":
        yield W.detach()


def _product(rows: int, right: Tensor) -> Callable[[int], object]:
    x, out = _rows_of(rows, right)
    return lambda size: in_slices(x, right, size or rows, out)


def _through_fp32(right: Tensor) -> Callable[[int], object]:
    x, out = _rows_of(IN_FP32_ROWS, right)
    return lambda way: in_fp32(x, right, out) if way else torch.mm(x, right, out=out)


def _rows_of(rows: int, right: Tensor) -> tuple[Tensor, Tensor]:
    """What is multiplied with right (in, out), (rows, in), and where the product is written, (rows, out)."""
    x = torch.ones(rows, right.shape[0], dtype=right.dtype, device="cpu")
    return x, torch.empty(rows, right.shape[1], dtype=right.dtype, device="cpu")


def _attention(
    sizes: tuple[int, int, int, int], shared: int, dtype: torch.dtype, ways: tuple[Way, Way]
) -> Callable[[int], object]:
    """Forward and backward over q of these sizes (B, H, T, D), and k and v with `shared` heads, either way."""
    batch, heads, length, width = sizes
    q = torch.ones(batch, length, heads, width, dtype=dtype, device="cpu").transpose(1, 2)
    k, v = (torch.ones(batch, length, shared, width, dtype=dtype, device="cpu").transpose(1, 2) for _ in range(2))

    def run(way: int) -> None:
        pattern = Pattern(way=ways[way])
        out, sums, dropped = attention.forward(q, k, v, pattern)
        attention.backward(out, (q, k, v), (out, sums, dropped), pattern)

    return run
