"""GEMM baseline of a step: only the matmuls with the base's weights: each forward, each input gradient, and the head's.

Each shape uses its best method on this machine, found by trial: some shapes run at half speed with all rows at once,
and some processors multiply bf16 more slowly than fp32 copies. No implementation of a step can be faster, except for
attention's own matmuls, which are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.ops.choices import NARROW, matmul_in_fp32

SLICES = {"cpu": (128, 256, 512, 1024), "cuda": (2048, 4096, 8192)}
OF_HEAD = {"cpu": (64, 128, 256, 512), "cuda": (1024, 2048, 4096)}
TRIALS = 3


class Method(NamedTuple):
    """Method of a matmul: slice size, and whether in fp32."""

    rows: int
    fp32: bool

    def multiply(self, x: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """Write the product of x (N, in) and right (in, out) to out."""
        return matmul_in_fp32(x, right, out) if self.fp32 else torch.mm(x, right, out=out)


def gemm_baseline(model: Any, job: Any) -> Callable[[int], float]:
    """Return a function that runs the matmuls of one step.

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
    target = {"device": W_head.device, "dtype": W_head.dtype}
    slices, of_head = SLICES[W_head.device.type], OF_HEAD[W_head.device.type]
    given = {width: torch.randn(job.tokens, width, **target) for width in widths}
    made = {
        width: torch.empty_like(buffer) for width, buffer in given.items()
    }  # never read: repeated products would vanish
    plans: dict[tuple[Any, ...], Method] = {}
    with torch.no_grad():
        for W in weights:
            for right in (W.t(), W):
                if (key := (*right.shape, right.stride())) not in plans:
                    methods = _methods(W, slices, job.tokens)
                    plans[key] = _best(lambda method, right=right: _product(given, right, made, method), methods)
        best_of_head = _best(lambda method: _head(given, W_head, made, method), _methods(W_head, of_head, job.tokens))

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
    """Return the weight as (out, in)."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, torch.nn.Linear) else weight.t()


def _product(given: dict[int, Tensor], right: Tensor, made: dict[int, Tensor], method: Method) -> None:
    """Multiply rows (N, in) by right (in, out)."""
    x, y = given[right.shape[0]], made[right.shape[1]]
    for begin in range(0, len(x), method.rows):
        method.multiply(x[begin : begin + method.rows], right, y[begin : begin + method.rows])


def _head(given: dict[int, Tensor], W: Tensor, made: dict[int, Tensor], method: Method) -> None:
    """Compute the logits of some rows at a time, and the gradient from as many values."""
    x, y = given[W.shape[1]], made[W.shape[1]]
    logits = torch.empty(method.rows, len(W), dtype=W.dtype, device=W.device)
    for begin in range(0, len(x), method.rows):
        part = x[begin : begin + method.rows]
        z = method.multiply(part, W.t(), logits[: len(part)])
        method.multiply(z, W, y[begin : begin + method.rows])


def _methods(W: Tensor, sizes: tuple[int, ...], rows: int) -> list[Method]:
    """Return all methods to try."""
    narrow = W.device.type == "cpu" and W.dtype in NARROW
    return [
        Method(size, fp32) for size in sorted({min(size, rows) for size in (*sizes, rows)}) for fp32 in {False, narrow}
    ]


def _best(work: Callable[[Method], None], methods: list[Method]) -> Method:
    """Return the fastest method, by the median of some trials."""
    taken = {}
    for method in methods:
        work(method)
        samples = []
        for _ in range(TRIALS):
            _wait()
            began = time.perf_counter()
            work(method)
            _wait()
            samples.append(time.perf_counter() - began)
        taken[method] = statistics.median(samples)
    return min(taken, key=lambda method: taken[method])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
