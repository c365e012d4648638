"""Claim: matmuls and attention of every shape use the fastest method on this machine.

    python benchmarks/bench_products.py [--rows 768 1024 1280 2048] [--lengths 256 1024] [--repeats 9]

For each matmul of a step with a frozen weight, forward (x·Wᵀ, W by columns) and backward (dy·W, by rows), the time with
all rows at once and in slices; attention, forward and backward, by matmuls and by flash; and the method that `lorakit
train`'s autotuning selects. Then one matmul including the adapter's, cat(x, h)·cat(W, s·B)ᵀ, compared with the two that
are used, x·Wᵀ and h·(s·B)ᵀ added to it: the possible gain if the required copy of the weights were free. Then attention
with sinks, forward and backward, by each method and by transformers' eager function for gpt-oss. Rows are appended to
results/products.jsonl.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from runner import append_row, seconds_of
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lorakit.allocator import keep_large_blocks
from lorakit.ops.attention import backward, forward
from lorakit.ops.attention_pattern import Method, Pattern
from lorakit.ops.choices import IN_FP32
from lorakit.speed.tuning import TuningTask, attention_tasks, fastest, matmul_tasks

SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576), (896, 896), (2048, 2048))
"""(in, out): those of SmolLM2-135M, and squares of Qwen2.5-0.5B and of a 1B model."""

RANK = 16

HEADS_WITH_SINKS = (16, 2, 64)
"""Heads of q, heads of k, and head width: a quarter of the heads of gpt-oss-20b."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[768, 1024, 1280, 2048])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    keep_large_blocks()
    dtype = getattr(torch, options.dtype)
    model: Any = nn.ModuleList([nn.Linear(*shape, bias=False, dtype=dtype) for shape in SHAPES]).requires_grad_(False)
    model.config = SimpleNamespace(num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576)
    with torch.no_grad():
        for task in [*matmul_tasks(model, max(options.rows)), *attention_tasks(model, max(options.lengths))]:
            if task.name.endswith(IN_FP32) or size_of(task) in (*options.rows, *options.lengths):
                report(task, options)
        for rows in options.rows:
            for inner, outer in SHAPES:
                with_adapter(rows, inner, outer, dtype, options.repeats)
    for tokens in options.lengths:
        with_sinks(tokens, dtype, options.repeats)


def size_of(task: TuningTask) -> int:
    """Return the rows of a matmul or the tokens of attention, from its name."""
    return int(task.name.split()[1].partition("x")[0])


def report(task: TuningTask, options: argparse.Namespace) -> None:
    """Append a row for each method of a shape."""
    run, chosen = task.prepare(), fastest(task, time.perf_counter)
    default = not task.name.endswith(IN_FP32)
    is_product, size = task.name.startswith("product"), task.name.split()[1]
    multiply_adds = math.prod(int(number) for number in size.split("x")) if is_product else 0
    methods = {method: partial(run, method) for method in (task.default, *task.others)}
    for method, seconds in interleaved(methods, options.repeats).items():
        label = named(method, is_product) if default else ("fp32" if method else "default")
        samples = {"milliseconds": [1e3 * s for s in seconds]}
        if is_product and default:
            samples["gflops_per_second"] = [2 * multiply_adds / s / 1e9 for s in seconds]
        append_row("products", {"what": task.name, "method": label, "chosen": method == chosen}, samples)


def named(method: int, is_product: bool) -> str:
    return (
        (f"{method} rows at a time" if method else "all at once") if is_product else ("flash" if method else "matmul")
    )


def with_adapter(rows: int, inner: int, outer: int, dtype: torch.dtype, repeats: int) -> None:
    """Measure the matmul with the base and that with B, as two and as one."""
    x, h = torch.ones(rows, inner, dtype=dtype), torch.ones(rows, RANK, dtype=dtype)
    W, B = torch.ones(outer, inner, dtype=dtype), torch.ones(outer, RANK, dtype=dtype)
    both, wide, y = torch.cat([x, h], 1), torch.cat([W, B], 1), torch.empty(rows, outer, dtype=dtype)
    methods: dict[Any, Callable[[], object]] = {
        "base alone": lambda: torch.mm(x, W.t(), out=y),
        "two matmuls": lambda: torch.mm(x, W.t(), out=y).addmm_(h, B.t()),
        "one matmul, copies not timed": lambda: torch.mm(both, wide.t(), out=y),
    }
    for name, seconds in interleaved(methods, repeats).items():
        facts = {"what": f"adapter within the matmul, {rows}x{inner}x{outer}, r {RANK}", "method": name}
        append_row("products", facts, {"milliseconds": [1e3 * s for s in seconds]})


def with_sinks(tokens: int, dtype: torch.dtype, repeats: int) -> None:
    """Measure causal attention with sinks, forward and backward, by each method and by transformers' eager function."""
    heads, shared, width = HEADS_WITH_SINKS
    q, k, v = (torch.randn(1, n, tokens, width, dtype=dtype, requires_grad=True) for n in (heads, shared, shared))
    sinks = torch.zeros(heads, dtype=dtype)
    module: Any = SimpleNamespace(num_key_value_groups=heads // shared, sinks=sinks, training=False)
    mask = torch.full((1, 1, tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)

    def ours(method: Method) -> None:
        pattern = Pattern(sinks=sinks, method=method)
        with torch.no_grad():
            saved = forward(q, k, v, pattern)
            backward(torch.ones_like(saved[0]), (q, k, v), saved, pattern)

    def eager() -> None:
        out, _ = eager_attention_forward(module, q, k, v, mask, width**-0.5)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    ways: tuple[Method, ...] = ("matmul", "matmul_fp32", "flash")
    methods: dict[Any, Callable[[], object]] = {method: partial(ours, method) for method in ways}
    what = f"attention with sinks, {tokens} tokens {heads}/{shared}x{width} {str(dtype)[6:]} causal"
    for name, seconds in interleaved({**methods, "transformers, eager": eager}, repeats).items():
        append_row("products", {"what": what, "method": name}, {"milliseconds": [1e3 * s for s in seconds]})


def interleaved(methods: Mapping[Any, Callable[[], object]], repeats: int) -> dict[Any, list[float]]:
    """Return the seconds of each method, interleaved in every round; the first round is not counted."""
    rounds = [
        {method: seconds_of(run, repeats=1, warmup=0)[0] for method, run in methods.items()} for _ in range(repeats + 1)
    ]
    return {method: [taken[method] for taken in rounds[1:]] for method in methods}


if __name__ == "__main__":
    main()
