"""Claim: a step whose base matmuls run in int8 is faster than a bf16 step, and its base is smaller.

    python benchmarks/bench_int8.py [--model smollm2 llama-1b] [--rounds 7] [--dropout 0.05] [--ablate]

LoRA of rank 16 on all linear layers, 4 rows of 256 tokens, random weights, malloc set up as by `lorakit train`. The
geometry "smollm2" is SmolLM2-135M's; "llama-1b" is a quarter of Llama-3.2-1B: 4 of 16 layers and a quarter of the
vocabulary, so that the head is the same fraction of a step as in the model. All sides run in one process and take
turns: the step of `lorakit train` in bf16 and with an int8 base, and the matmuls of a step alone (forward, input
gradient, head), in bf16 and in int8 (head in bf16). `--ablate` adds int8 steps with one part disabled: the input
quantized once per weight instead of once for all weights that share it, PyTorch operations instead of the C kernels
around the int8 matmuls, or PyTorch's int8 matmuls instead of those in C, with AMX or VNNI. To measure VNNI on a
processor that has AMX, set CC="gcc -mno-amx-tile -mno-amx-int8 -mno-amx-bf16" and ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16.

A row has seconds per step, ratios of medians, and bytes of the base. Rows are appended to results/int8.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import products
import torch
from runner import append_row
from stepping import LLAMAS, OURS, Job, geometry, prepared, token_ids
from torch import Tensor

from lorakit.allocator import set_up
from lorakit.core import Int8Linear, quantize_base
from lorakit.ops import int8, int8_weight, linear
from lorakit.ops.kernels import compiled

QUARTER = 4
HEAD_ROWS = 256
"""Rows for which the head is computed at a time, in the matmuls alone."""
BF16_STEP, INT8_STEP, BF16_MATMULS, INT8_MATMULS = "bf16 step", "int8 step", "bf16 matmuls", "int8 matmuls"
APART, PLAIN = "int8 step, quantized per weight", "int8 step, PyTorch operations"
SEPARATE = "int8 step, PyTorch matmuls"

Step = Callable[[int], object]


def main() -> None:
    """Measure the sides in turn, and append one row per side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("smollm2", "llama-1b"), default=["smollm2", "llama-1b"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--layers", type=int, help="fewer layers than usual, for quick trials")
    parser.add_argument("--ablate", action="store_true")
    options = parser.parse_args()
    set_up()
    for name in options.model:
        layers = options.layers or (LLAMAS[name]["num_hidden_layers"] // (QUARTER if name == "llama-1b" else 1))
        job = Job(model=name, dropout=options.dropout, layers=layers)
        steps, facts = sides(job, options.ablate)
        report(facts | {"model": name, "layers": layers, "dropout": job.dropout}, measure(steps, options.rounds))


def sides(job: Job, ablate: bool) -> tuple[dict[str, Step], dict[str, Any]]:
    """Return the sides by name, and the size of the bases."""
    dense, quantized = model_of(job), model_of(job)
    mm, int_mm = (lambda a, b, c: torch.mm(a, b, out=c)), (lambda a, b, c: torch._int_mm(a, b, out=c))
    steps: dict[str, Step] = {BF16_MATMULS: matmuls(dense, job, mm, torch.bfloat16)}
    base = quantize_base(quantized, [{"input_ids": token_ids(quantized, job, 0)}])
    steps[INT8_MATMULS] = matmuls(quantized, job, int_mm, torch.int32)
    untuned = {"autotuning"}  # measuring kernels would take longer than all steps
    steps[BF16_STEP] = prepared(OURS, dense, job, untuned)[1]
    ours = steps[INT8_STEP] = prepared(OURS, quantized, job, untuned)[1]
    if ablate:
        steps |= {APART: within(quantized_per_weight, ours), PLAIN: within(without_kernels, ours)}
        found = compiled.kernels()
        if found is not None and found.int8_matmuls is not None:
            steps[SEPARATE] = within(lambda: mock.patch.object(found, "int8_matmuls", None), ours)
    return steps, {"bytes_before": base.bytes_before, "bytes_after": base.bytes_after}


def model_of(job: Job) -> Any:
    """Return a frozen model with random weights, with a quarter of the vocabulary for Llama-3.2-1B."""
    sizes = LLAMAS[job.model]
    small = {"vocab_size": sizes["vocab_size"] // (QUARTER if job.model == "llama-1b" else 1)}
    torch.manual_seed(0)
    with mock.patch.dict(sizes, small):
        return geometry(job).requires_grad_(False).train()


def matmuls(model: Any, job: Job, multiply: Callable[[Tensor, Tensor, Tensor], object], out: torch.dtype) -> Step:
    """Return the matmuls of a step alone: forward, head in bf16, input gradients.

    Args:
        model: The model, before it is accelerated.
        job: Rows and length of the batches.
        multiply: Function that writes the product of two matrices to a third one.
        out: Dtype of the products.
    """
    head = model.get_output_embeddings().weight.detach()
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Int8Linear))]
    found = [module.int8.q if isinstance(module, Int8Linear) else module.weight.detach() for module in layers]
    weights = [W for W in found if W.data_ptr() != head.data_ptr()]
    widths = {width for W in weights for width in W.shape}
    given = {width: torch.ones(job.tokens, width, dtype=weights[0].dtype) for width in widths}
    made = {width: torch.empty(job.tokens, width, dtype=out) for width in widths}
    x = {head.shape[1]: torch.randn(job.tokens, head.shape[1], dtype=head.dtype)}
    y = {head.shape[1]: torch.empty(job.tokens, head.shape[1], dtype=head.dtype)}

    def step(number: int) -> None:
        with torch.no_grad():
            for W in weights:
                multiply(given[W.shape[1]], W.t(), made[W.shape[0]])
            products._head(x, head, y, products.Method(HEAD_ROWS, fp32=False))
            for W in reversed(weights):
                multiply(given[W.shape[0]], W, made[W.shape[1]])

    return step


def within(context: Callable[[], contextlib.AbstractContextManager[object]], step: Step) -> Step:
    """Return a step that runs inside a context."""

    def run(number: int) -> None:
        with context():
            step(number)

    return run


@contextlib.contextmanager
def quantized_per_weight() -> Iterator[None]:
    """Quantize an input again for each weight."""

    class Apart(int8.Int8Inputs):
        def quantized(self, weight: int8_weight.Int8Weight) -> Any:
            self._made.clear()
            return super().quantized(weight)

    with mock.patch.object(linear, "Int8Inputs", Apart):
        yield


def without_kernels() -> contextlib.AbstractContextManager[object]:
    """Return a context in which PyTorch operations quantize, scale and round."""
    return mock.patch.object(int8, "kernels_for", lambda *_: None)


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side's steps; the first round is not counted."""
    found: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(rounds + 1):
        for side, step in steps.items():
            start = time.perf_counter()
            step(number)
            if number:
                found[side].append(time.perf_counter() - start)
    return found


def report(facts: dict[str, Any], found: dict[str, list[float]]) -> None:
    """Append a row per side, with the ratios of its median to those of the int8 step and of the bf16 matmuls."""
    middle = {side: statistics.median(seconds) for side, seconds in found.items()}
    for side, seconds in found.items():
        ratios = {
            "of_bf16_matmuls": middle[side] / middle[BF16_MATMULS],
            "of_int8_step": middle[side] / middle[INT8_STEP],
        }
        append_row("int8", {"side": side, **facts, **{k: round(v, 3) for k, v in ratios.items()}}, {"seconds": seconds})


if __name__ == "__main__":
    main()
