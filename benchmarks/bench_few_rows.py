"""Claim: up to 64 rows with a bf16 weight are multiplied 1.2 to 1.9 times as fast as by torch.mm on a core with AMX.

    python benchmarks/bench_few_rows.py [--dtype bfloat16] [--rows 1 4 16 32 64] [--rounds 9]

The shapes are those of SmolLM2-135M, with its head, and of a 1B model. Sides: `lorakit.ops.linear.few_rows`, and
torch.mm. Each sample multiplies with as many copies of the weight as fill more than the cache of a core, and the sides
take turns. There is one thread, whose CPU time is measured, because that depends less on other programs. On a
processor with AMX, CC="gcc -mno-amx-tile -mno-amx-int8 -mno-amx-bf16" and ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 show
both without it. A row has the bytes of the weight per CPU-second. Rows are appended to results/few_rows.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from runner import append_row
from torch import Tensor

from lorakit.ops.kernels import compiled
from lorakit.ops.linear import few_rows

SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576), (576, 49152), (2048, 2048), (2048, 8192), (8192, 2048))
"""(in, out)."""

LEAST = 40 << 20
"""Bytes of all copies of a weight."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(compiled.describe())
    sides: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {"lorakit": few_rows, "torch.mm": by_pytorch}
    for (width, out), rows in itertools.product(SHAPES, options.rows):
        count = LEAST // (width * out * dtype.itemsize) + 1
        weights = [torch.randn(out, width, dtype=dtype) for _ in range(count)]
        x = torch.randn(rows, width, dtype=dtype)
        if few_rows(x, weights[0]) is None:
            continue
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.rounds + 1):
            for side, multiply in sides.items():
                taken = seconds(multiply, x, weights)
                if number:
                    speeds[side].append(count * width * out * dtype.itemsize / taken / 1e9)
        for side, found in speeds.items():
            facts = {"side": side, "in": width, "out": out, "rows": rows, "dtype": options.dtype}
            append_row("few_rows", facts, {"gigabytes_per_second": found})


def by_pytorch(x: Tensor, W: Tensor) -> Tensor:
    """Return x·Wᵀ (rows, out) for x (rows, in) and W (out, in)."""
    return torch.mm(x, W.t())


def seconds(multiply: Callable[[Tensor, Tensor], object], x: Tensor, weights: Sequence[Tensor]) -> float:
    """Return the CPU-seconds of multiplying x (rows, in) with each weight (out, in)."""
    began = time.thread_time()
    for W in weights:
        multiply(x, W)
    return time.thread_time() - began


if __name__ == "__main__":
    main()
