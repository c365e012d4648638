"""Claim: clipping and AdamW on a flat buffer are faster than tensor by tensor, with the same bits.

    python benchmarks/bench_optimizer.py [--layers 30] [--r 16] [--threads 1 2] [--repeats 15]

The tensors are those of an adapter on all linear modules of SmolLM2-135M's geometry; gradients are where a backward
puts them. Interleaved: norm, clipping and a step of torch's fused AdamW with a list of tensors; norm and a step with
flat buffers, as in `lorakit train`; and, as the lower bound, norm and a step on a gradient that is already in one
buffer. The last line is the time to cast A and B to the base's dtype, for a forward and a backward. Rows are appended
to results/optimizer.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from runner import append_row, seconds_of
from torch import nn

from lorakit.allocator import keep_large_blocks
from lorakit.ops.adapted import Adapted, LowRank
from lorakit.ops.linear import Group
from lorakit.train.loop.optimizer import build_adamw, clipped_step, gradient_norm

GROUPS = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))
"""(in, outs) of the modules of a block that share an input."""

Named = list[tuple[str, nn.Parameter]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    keep_large_blocks()
    torch.manual_seed(0)
    modules = [(i, o) for _ in range(options.layers) for i, outs in GROUPS for o in outs]
    shapes = [shape for i, o in modules for shape in ((options.r, i), (o, options.r))]
    methods = {"each tensor": plain(shapes), "flat": flat(shapes), "gradient in one buffer": ideal(shapes)}
    methods["casts of A and B"] = casts(options.layers, options.r)
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        taken: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(options.repeats + 1):
            for method, work in methods.items():
                taken[method] += seconds_of(work, repeats=1, warmup=0)
        for method, seconds in taken.items():
            facts = {
                "what": method,
                "tensors": len(shapes),
                "numbers": sum(a * b for a, b in shapes),
                "threads": threads,
            }
            append_row("optimizer", facts, {"milliseconds": [1e3 * s for s in seconds[1:]]})


def parameters(shapes: list[tuple[int, int]]) -> Named:
    return [(str(n), nn.Parameter(torch.randn(shape))) for n, shape in enumerate(shapes)]


def plain(shapes: list[tuple[int, int]]) -> Callable[[], object]:
    """Return torch's optimizer over a list of tensors."""
    tensors = [p for _, p in parameters(shapes)]
    return stepping(torch.optim.AdamW(tensors, lr=1e-4, weight_decay=0.0, fused=True), tensors)


def flat(shapes: list[tuple[int, int]]) -> Callable[[], object]:
    """Return `lorakit train`'s optimizer."""
    named = parameters(shapes)
    return stepping(build_adamw(named, 1e-4, 0.0), [p for _, p in named])


def ideal(shapes: list[tuple[int, int]]) -> Callable[[], object]:
    """Return an optimizer over one tensor of the same size: nothing has to be flattened."""
    return flat([(1, sum(a * b for a, b in shapes))])


def stepping(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter]) -> Callable[[], object]:
    gradients = [torch.randn_like(p) for p in tensors]

    def step() -> None:
        for p, gradient in zip(tensors, gradients, strict=True):
            p.grad = gradient
        clipped_step(optimizer, tensors, gradient_norm(tensors), 1.0)

    return step


def casts(layers: int, r: int) -> Callable[[], object]:
    """Return the casts of all factors that a forward and a backward do before their matmuls."""

    def module(inner: int, outer: int) -> Adapted:
        A, B = nn.Parameter(torch.randn(r, inner)), nn.Parameter(torch.randn(outer, r))
        return Adapted(torch.empty(0), None, LowRank(A, B, 2.0, 0.0))

    groups = [[module(i, o) for o in outs] for _ in range(layers) for i, outs in GROUPS]

    @torch.no_grad()
    def make() -> None:
        for group in groups:
            for _ in ("forward", "backward"):
                Group(group, torch.bfloat16)

    return make


if __name__ == "__main__":
    main()
