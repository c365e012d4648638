"""Claim: products and attention of every shape go the way that is faster on this machine.

python benchmarks/bench_products.py [--rows 768 1024 1280 2048] [--lengths 256 1024] [--repeats 9]

For each product of a step with a frozen weight, forward (x·Wᵀ, W by columns) and backward (dy·W, by rows), the rate
with all rows at once and some at a time; attention, forward and backward, by products and by flash; and the way that
`lorakit train` would take, from a measurement of its own. Then one product with the adapter's in it,
cat(x, h)·cat(W, s·B)ᵀ, beside the two that are taken, x·Wᵀ and h·(s·B)ᵀ added to it: what it would gain if the copy of
the weights that it needs cost nothing. The numbers go into results/products.jsonl.
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

from lorakit.allocator import keep_large_blocks
from lorakit.speed.tuning import Question, answer, attentions, products

SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576), (896, 896), (2048, 2048))
"""in, out: SmolLM2-135M's, and squares of Qwen2.5-0.5B and of a 1B model."""

RANK = 16


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
        for question in [*products(model, max(options.rows)), *attentions(model, max(options.lengths))]:
            if "through fp32" in question.name or size_of(question) in (*options.rows, *options.lengths):
                report(question, options)
        for rows in options.rows:
            for inner, outer in SHAPES:
                with_adapter(rows, inner, outer, dtype, options.repeats)


def size_of(question: Question) -> int:
    """Rows of a product, tokens of attention, as its name has them."""
    return int(question.name.split()[1].partition("x")[0])


def report(question: Question, options: argparse.Namespace) -> None:
    """A row for each way of a shape."""
    run, chosen = question.prepare(), answer(question, time.perf_counter)
    usual = "through fp32" not in question.name
    is_product, size = question.name.startswith("product"), question.name.split()[1]
    multiply_adds = math.prod(int(number) for number in size.split("x")) if is_product else 0
    ways = {way: partial(run, way) for way in (question.usual, *question.others)}
    for way, seconds in interleaved(ways, options.repeats).items():
        word = named(way, is_product) if usual else ("through fp32" if way else "as usual")
        samples = {"milliseconds": [1e3 * s for s in seconds]}
        if is_product and usual:
            samples["gflops_per_second"] = [2 * multiply_adds / s / 1e9 for s in seconds]
        append_row("products", {"what": question.name, "way": word, "chosen": way == chosen}, samples)


def named(way: int, is_product: bool) -> str:
    return (f"{way} rows at a time" if way else "all at once") if is_product else ("flash" if way else "products")


def with_adapter(rows: int, inner: int, outer: int, dtype: torch.dtype, repeats: int) -> None:
    """The product with the base and that with B, as two and as one."""
    x, h = torch.ones(rows, inner, dtype=dtype), torch.ones(rows, RANK, dtype=dtype)
    W, B = torch.ones(outer, inner, dtype=dtype), torch.ones(outer, RANK, dtype=dtype)
    both, wide, y = torch.cat([x, h], 1), torch.cat([W, B], 1), torch.empty(rows, outer, dtype=dtype)
    ways: dict[Any, Callable[[], object]] = {
        "base alone": lambda: torch.mm(x, W.t(), out=y),
        "two products": lambda: torch.mm(x, W.t(), out=y).addmm_(h, B.t()),
        "one product, copies made before": lambda: torch.mm(both, wide.t(), out=y),
    }
    for name, seconds in interleaved(ways, repeats).items():
        facts = {"what": f"adapter in the product, {rows}x{inner}x{outer}, r {RANK}", "way": name}
        append_row("products", facts, {"milliseconds": [1e3 * s for s in seconds]})


def interleaved(ways: Mapping[Any, Callable[[], object]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each way, one after the other in every round; the first round does not count."""
    rounds = [{way: seconds_of(run, repeats=1, warmup=0)[0] for way, run in ways.items()} for _ in range(repeats + 1)]
    return {way: [taken[way] for taken in rounds[1:]] for way in ways}


if __name__ == "__main__":
    main()
