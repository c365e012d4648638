"""The products of a step with the base's weights and nothing else: each forward, each input gradient, and the head's.

Rows are multiplied the way that is best for each shape on this machine, found by trial: some shapes run at half speed
with all rows at once, and some processors multiply bf16 more slowly than its fp32 image. This is what no implementation
of the step can go below, but for attention's own products, which are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.ops.choices import NARROW, in_fp32

SLICES = {"cpu": (128, 256, 512, 1024), "cuda": (2048, 4096, 8192)}
OF_HEAD = {"cpu": (64, 128, 256, 512), "cuda": (1024, 2048, 4096)}
TRIALS = 3


class Way(NamedTuple):
    """How rows are multiplied: so many at a time, and perhaps through fp32."""

    rows: int
    fp32: bool

    def multiply(self, x: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """The product of x (N, in) and right (in, out), into out."""
        return in_fp32(x, right, out) if self.fp32 else torch.mm(x, right, out=out)


def bare_products(model: Any, job: Any) -> Callable[[int], float]:
    """A function that multiplies once as a step does.

    Args:
        model: The base, without adapters.
        job: Rows and length of its batches.

    Returns:
        A step, whose loss is NaN.
    """
    head = model.get_output_embeddings()
    weights = [_as_linear(module) for module in model.modules() if _is_linear(module) and module is not head]
    W_head = head.weight.detach()
    widths = {width for W in weights for width in W.shape} | {W_head.shape[1]}
    place = {"device": W_head.device, "dtype": W_head.dtype}
    slices, of_head = SLICES[W_head.device.type], OF_HEAD[W_head.device.type]
    given = {width: torch.randn(job.tokens, width, **place) for width in widths}
    made = {width: torch.empty_like(room) for width, room in given.items()}  # never read: numbers would die out
    plans: dict[tuple[Any, ...], Way] = {}
    with torch.no_grad():
        for W in weights:
            for right in (W.t(), W):
                if (key := (*right.shape, right.stride())) not in plans:
                    ways = _ways(W, slices, job.tokens)
                    plans[key] = _best(lambda way, right=right: _product(given, right, made, way), ways)
        best_of_head = _best(lambda way: _head(given, W_head, made, way), _ways(W_head, of_head, job.tokens))

    def step(number: int) -> float:
        with torch.no_grad():
            for W in weights:
                _product(given, W.t(), made, plans[(*W.t().shape, W.t().stride())])
            _head(given, W_head, made, best_of_head)
            for W in reversed(weights):
                _product(given, W, made, plans[(*W.shape, W.stride())])
        return float("nan")

    return step


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _as_linear(module: Any) -> Tensor:
    """The weight (out, in)."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, torch.nn.Linear) else weight.t()


def _product(given: dict[int, Tensor], right: Tensor, made: dict[int, Tensor], way: Way) -> None:
    """Rows (N, in) times right (in, out)."""
    x, y = given[right.shape[0]], made[right.shape[1]]
    for begin in range(0, len(x), way.rows):
        way.multiply(x[begin : begin + way.rows], right, y[begin : begin + way.rows])


def _head(given: dict[int, Tensor], W: Tensor, made: dict[int, Tensor], way: Way) -> None:
    """Logits of some rows at a time, and what goes back from as many numbers."""
    x, y = given[W.shape[1]], made[W.shape[1]]
    logits = torch.empty(way.rows, len(W), dtype=W.dtype, device=W.device)
    for begin in range(0, len(x), way.rows):
        part = x[begin : begin + way.rows]
        z = way.multiply(part, W.t(), logits[: len(part)])
        way.multiply(z, W, y[begin : begin + way.rows])


def _ways(W: Tensor, sizes: tuple[int, ...], rows: int) -> list[Way]:
    """All that are tried."""
    narrow = W.device.type == "cpu" and W.dtype in NARROW
    return [
        Way(size, fp32) for size in sorted({min(size, rows) for size in (*sizes, rows)}) for fp32 in {False, narrow}
    ]


def _best(work: Callable[[Way], None], ways: list[Way]) -> Way:
    """The way that takes the least time, by the median of some trials."""
    taken = {}
    for way in ways:
        work(way)
        samples = []
        for _ in range(TRIALS):
            _wait()
            began = time.perf_counter()
            work(way)
            _wait()
            samples.append(time.perf_counter() - began)
        taken[way] = statistics.median(samples)
    return min(taken, key=lambda way: taken[way])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
