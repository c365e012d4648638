"""Show where the time of a step goes, by torch's profiler: peft, lorakit and the GEMM baseline as stacked bars.

    python benchmarks/picture_of_step.py [--dropout 0.05] [--steps 2] [--picture docs/performance.svg]

The step of bench_step.py, each side in a new process with the allocator that keeps blocks. The seconds of an operation
exclude those of operations it calls, on the calling thread; operations are sorted into parts by name and input shapes;
lorakit's compiled kernels are recorded as operations. Time outside operations (Python, autograd) is "between
operations". A profiled step is slower than others, mainly between operations: the bars show fractions; bench_step.py
measures seconds. A row per side is appended to results/picture.jsonl; the picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner import append_row
from stepping import GEMM, OURS, PEFT, TARGETS, Job, prepare

BASE, HEAD, LOW, ATTENTION = "base matmuls", "head matmul", "adapter matmuls", "attention"
LOSS, DROPOUT, COPIES, REST = "loss softmax", "dropout", "copies and casts", "other elementwise"
OPTIMIZER, BETWEEN = "optimizer", "between operations"
PARTS = {
    BASE: "#33557f",
    HEAD: "#6f92bd",
    LOW: "#d9822b",
    ATTENTION: "#5f9e6e",
    LOSS: "#b7cfa5",
    DROPOUT: "#c44e52",
    COPIES: "#a08bb5",
    REST: "#c9b7a0",
    OPTIMIZER: "#8c6d62",
    BETWEEN: "#d5d5d5",
}
"""Part -> its color."""

OF_PRODUCTS = ("mm", "addmm", "addmm_", "linear", "matmul")
OF_ATTENTION = ("turn", "bmm", "baddbmm", "baddbmm_", "scaled_dot_product", "flash_attention")
OF_DROPOUT = ("drop", "bernoulli", "rand", "index_fill", "cumsum", "searchsorted", "log1p", "native_dropout")
OF_COPIES = ("copy_", "_to_copy", "clone", "contiguous", "cat", "zero_", "fill_", "zeros", "empty")
OF_LOSS = ("softmax", "log_softmax", "nll_loss", "logsumexp", "gather", "scatter", "log", "cross_entropy")
OF_OPTIMIZER = ("_fused_adamw", "_foreach", "linalg_vector_norm", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(TARGETS), default="smollm2")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2, help="profiled steps, after one that is not")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for quick trials")
    parser.add_argument("--picture", type=Path, help="file to draw to")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "JOB", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, fields, steps = options.child
        print(json.dumps(profiled(side, Job(**json.loads(fields)), int(steps))))
        return
    job = Job(options.model, rows=options.rows, length=options.length, dropout=options.dropout, layers=options.layers)
    bars = {}
    for side in (PEFT, OURS, GEMM):
        bars[side] = child(side, job, options.steps)
        facts = {"what": side, "profiled": True, "allocator": "tuned", **asdict(job)}
        append_row("picture", facts, {f"{part}: seconds": [taken] for part, taken in bars[side].items()})
    if options.picture:
        draw(bars, options.picture, job)


def child(side: str, job: Job, steps: int) -> dict[str, float]:
    """Return the seconds of a step by part, measured in a new process."""
    command = [sys.executable, __file__, "--child", side, json.dumps(asdict(job)), str(steps)]
    environment = {**os.environ, "LORAKIT_ALLOCATOR": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def profiled(side: str, job: Job, steps: int) -> dict[str, float]:
    """Return the mean seconds of a step by part."""
    from lorakit.allocator import keep_large_blocks

    keep_large_blocks()
    import torch
    from torch.profiler import ProfilerActivity

    model, step = prepare(side, job)
    step(0)
    record_kernels()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profile:
        began = time.perf_counter()
        for number in range(1, steps + 1):
            step(number)
        wall = time.perf_counter() - began
    vocabulary, weights = model.config.vocab_size, weight_shapes(model)
    seconds: dict[str, float] = defaultdict(float)
    for event in profile.key_averages(group_by_input_shape=True):
        if "::" in event.key:  # an operation, not an optimizer step or an autograd node around operations
            part = part_of(event.key, event.input_shapes or [], vocabulary, weights)
            seconds[part] += event.self_cpu_time_total / 1e6
    seconds[BETWEEN] += max(0.0, wall - sum(seconds.values()))
    return {part: seconds[part] / steps for part in PARTS}


def record_kernels() -> None:
    """Record lorakit's compiled kernels in the profiler; they are not PyTorch operations."""
    from lorakit.ops.kernels import compiled

    kernels = compiled.kernels()
    for functions in kernels._functions.values() if kernels is not None else ():
        functions.update({name: recorded(f"kernel::{name}", function) for name, function in functions.items()})


def recorded(name: str, function: Callable[..., object]) -> Callable[..., object]:
    import torch

    def call(*args: object) -> object:
        with torch.profiler.record_function(name):
            return function(*args)

    return call


def weight_shapes(model: Any) -> set[tuple[int, ...]]:
    """Return the shapes of the base's weights, in both orientations."""
    kinds = ("Linear", "Conv1D")
    shapes = {tuple(module.weight.shape) for module in model.modules() if type(module).__name__ in kinds}
    shapes -= {tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    return shapes | {shape[::-1] for shape in shapes}


def part_of(name: str, shapes: list[list[int]], vocabulary: int, weights: set[tuple[int, ...]]) -> str:
    """Return the part of an operation, by its name and input shapes."""
    from lorakit.ops.choices import BLOCK  # rows of the head that are upcast at a time; no width of these models

    name = name.split("::")[-1]
    matrices = [shape for shape in shapes if len(shape) >= 2]
    if name in OF_PRODUCTS:
        sizes = [size for shape in matrices for size in shape[-2:]]
        if vocabulary in sizes or BLOCK in sizes:
            return HEAD
        return BASE if any(tuple(shape) in weights for shape in matrices) else LOW
    large = any(vocabulary in shape for shape in shapes)
    for words, part in ((OF_OPTIMIZER, OPTIMIZER), (OF_ATTENTION, ATTENTION), (OF_DROPOUT, DROPOUT)):
        if any(word in name for word in words):
            return part
    if large:
        return LOSS
    if "softmax" in name:
        return ATTENTION
    for words, part in ((OF_LOSS, LOSS), (OF_COPIES, COPIES)):
        if any(name == word or (len(word) > 4 and word in name) for word in words):
            return part
    return REST


def draw(bars: dict[str, dict[str, float]], path: Path, job: Job) -> None:
    """Draw stacked bars, one for each side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6))
    names = list(bars)[::-1]
    left = dict.fromkeys(names, 0.0)
    for part, colour in PARTS.items():
        widths = [bars[name][part] for name in names]
        axes.barh(names, widths, left=[left[name] for name in names], color=colour, label=part)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axes.set_xlabel(f"seconds/step, profiled · {job.model}, {job.rows} × {job.length} tokens, dropout {job.dropout:g}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="upper center", ncol=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.86))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
