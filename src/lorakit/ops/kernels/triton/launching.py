"""Launch the Triton kernels, which implement `Kernels` on CUDA. Triton's interpreter can run them on CPU tensors."""

from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from lorakit.ops.kernels.triton import programs

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options; Triton behaves differently if `enable_fp_fusion` is unset."""
TILE = 2048
"""Number of elements per program. Short rows share a program; a row with more elements gets its own program."""
ELEMENTWISE = 1024
THIN = {"ROWS": 32, "COLUMNS": 128}
"""Tile size for the wide operand of a low-rank matmul."""
PROGRAMS = 512
"""Number of programs sufficient to keep a large GPU busy."""
HEADS = 8
"""Maximum number of heads that one program rotates."""
LOGITS = 8192
"""Maximum number of logits that are processed at a time."""


class TritonKernels:
    """The kernels of `lorakit.ops.kernels.compiled.CompiledKernels` in Triton, and low-rank matmuls with dropout.

    These multiply with a factor `a` (r, n) in one pass; for a given seed, they drop the same elements as `drop`. The
    width n must be a multiple of 4.
    """

    activations = frozenset({"silu", "gelu", "gelu_tanh", "quick_gelu", "relu"})
    caps_logits = True
    attention = own = int8 = int8_matmuls = layer = linear = low_rank = slots = None

    def __init__(self) -> None:
        self.dropping = self

    def rms_forward(self, x: Tensor, w: Tensor, eps: float, offset: float, n: Tensor, rstd: Tensor) -> None:
        """Write the RMS norm of x (N, d) to n (N, d), and 1/RMS of each row to rstd (N, 1)."""
        self._rms(x, w, (eps, offset), n, rstd, again=False)

    def rms_recompute(self, x: Tensor, w: Tensor, offset: float, rstd: Tensor, n: Tensor) -> None:
        """Recompute the output n (N, d) of `rms_forward` from x and rstd (N, 1)."""
        self._rms(x, w, (0.0, offset), n, rstd, again=True)

    def _rms(self, x: Tensor, w: Tensor, numbers: tuple[float, float], n: Tensor, rstd: Tensor, *, again: bool) -> None:
        grid, tile = _tiles(x)
        flags = {"FROM_ZERO": numbers[1] != 0, "RECOMPUTE": again}
        with _on(x):
            programs.rms[grid](x, w, n, rstd, *x.shape, *numbers, **flags, **tile)

    def rms_backward(
        self, dn: Tensor, x: Tensor, w: Tensor, offset: float, rstd: Tensor, add: Tensor | None, dx: Tensor
    ) -> None:
        """Implement `CompiledKernels.rms_backward`; all are (N, d)."""
        grid, tile = _tiles(x)
        pointers = (dn, x, w, rstd, x if add is None else add, dx)
        with _on(x):
            programs.rms_backward[grid](*pointers, *x.shape, offset, HAS_ADD=add is not None, **tile)

    def gate(self, act: str, first: Tensor, up: Tensor | None, out: Tensor) -> None:
        """Write act(first)·up to `out`, or act(first) if `up` is None. All tensors are (N, f)."""
        flags = {"ACT": act, "HAS_UP": up is not None}
        with _on(first):
            programs.gate[_blocks(first)](
                first, first if up is None else up, out, first.numel(), **flags, BLOCK=ELEMENTWISE, **OPTIONS
            )

    def gate_backward(
        self, act: str, da: Tensor, first: Tensor, up: Tensor | None, dfirst: Tensor, dup: Tensor | None
    ) -> None:
        """Implement `CompiledKernels.gate_backward`; all are (N, f)."""
        flags = {"ACT": act, "HAS_UP": up is not None}
        pointers = (da, first, first if up is None else up, dfirst, dfirst if dup is None else dup)
        with _on(first):
            programs.gate_backward[_blocks(first)](*pointers, first.numel(), **flags, BLOCK=ELEMENTWISE, **OPTIONS)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool, out: Tensor) -> None:
        """Implement `CompiledKernels.rotate`; x and out are (B, T, H, D)."""
        batch, tokens, heads, width = x.shape
        rot = cos.shape[-1]
        flags = {"BACK": back, "PER_ROW": cos.numel() > tokens * rot}
        sizes = {"HEADS": min(HEADS, triton.next_power_of_2(heads)), "PAIRS": triton.next_power_of_2(rot // 2)}
        rest = {
            "IN_PLACE": rot == width or out.data_ptr() == x.data_ptr(),
            "REST": triton.next_power_of_2(max(width - rot, 1)),
        }
        grid = (batch * tokens, triton.cdiv(heads, sizes["HEADS"]))
        numbers = (x.stride(1), out.stride(1), tokens, heads, width, rot)
        with _on(x):
            programs.rotate[grid](x, cos, sin, out, *numbers, **flags, **sizes, **rest, **OPTIONS)

    def drop(self, x: Tensor, p: float, seed: Tensor, scale: float, out: Tensor) -> None:
        """Write scale·x (any shape) to `out`, which may be x, with zeros for dropped elements; seed is (1,)."""
        with _on(x):
            programs.drop[_blocks(x)](
                x, out, seed, x.numel(), round(p * 2**24), float(scale), BLOCK=ELEMENTWISE, **OPTIONS
            )

    def shrink(self, x: Tensor, a: Tensor, p: float, seed: Tensor) -> Tensor:
        """Return dropout(x)·aᵀ as a new tensor (N, r), for x (N, n) and `a` (r, n); n is a multiple of 4."""
        h = x.new_empty(len(x), len(a))
        with _on(x):
            programs.shrink[(triton.cdiv(len(x), THIN["ROWS"]),)](x, a, h, seed, *_low_rank(x, a, p), **_sizes(a))
        return h

    def add_low_rank(self, h: Tensor, a: Tensor, p: float, seed: Tensor, y: Tensor) -> None:
        """Add dropout(h·a) to y (N, n), for h (N, r) and `a` (r, n); n is a multiple of 4."""
        grid = (triton.cdiv(len(y), THIN["ROWS"]), triton.cdiv(y.shape[1], THIN["COLUMNS"]))
        with _on(y):
            programs.add_low_rank[grid](h, a, y, seed, *_low_rank(y, a, p), **_sizes(a))

    def outer(self, dh: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """Return dhᵀ·dropout(x) as a new fp32 tensor (r, n), for dh (N, r) and x (N, n); n is a multiple of 4."""
        a, blocks = dh.t(), triton.cdiv(x.shape[1], THIN["COLUMNS"])
        steps = triton.cdiv(len(x), THIN["ROWS"])
        each = triton.cdiv(steps, max(min(PROGRAMS // blocks, steps), 1))
        parts = x.new_empty(triton.cdiv(steps, max(each, 1)), len(a), x.shape[1], dtype=torch.float32)
        numbers = (*_low_rank(x, a, p), each * THIN["ROWS"])
        with _on(x):
            programs.outer[(blocks, len(parts))](dh, x, parts, seed, *numbers, **_sizes(a))
        return parts.sum(0)

    def softmax(self, scores: Tensor, low: Tensor | None, high: Tensor | None) -> None:
        """Implement `CompiledKernels.softmax`; scores is (Z, n, m)."""
        bounds = [bound for bound in (low, high) if bound is not None]
        kinds, m = len(bounds[0]) if bounds else 1, scores.shape[-1]
        flags, width = {"HAS_LOW": low is not None, "HAS_HIGH": high is not None}, triton.next_power_of_2(m)
        pointers = (scores, scores if low is None else low, scores if high is None else high)
        with _on(scores):
            programs.softmax[(scores.numel() // m,)](
                *pointers, kinds, m, **flags, WIDTH=width, num_warps=_warps(width), **OPTIONS
            )

    def softmax_backward(self, weights_: Tensor, ds: Tensor) -> None:
        """Replace ds, the gradient of the softmax weights (Z, n, m), with the gradient of the scores."""
        m = ds.shape[-1]
        width = triton.next_power_of_2(m)
        with _on(ds):
            programs.softmax_backward[(ds.numel() // m,)](
                weights_, ds, m, WIDTH=width, num_warps=_warps(width), **OPTIONS
            )

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, scale: float, gradients: bool, losses_: Tensor, cap: float | None = None
    ) -> None:
        """Implement `CompiledKernels.cross_entropy`; logits is (c, V)."""
        rows, vocabulary = logits.shape
        flags = {"CAPPED": cap is not None, "GRADIENTS": gradients}
        block = min(LOGITS, triton.next_power_of_2(vocabulary))
        numbers = (vocabulary, float(scale), float(cap or 1.0))
        with _on(logits):
            programs.cross_entropy[(rows,)](
                logits, labels, losses_, *numbers, **flags, BLOCK=block, num_warps=_warps(block), **OPTIONS
            )


def failure(device: torch.device) -> str:
    """Compile and run a kernel on a device; return an error message, or "" on success."""
    x, seed = torch.ones(8, device=device), torch.zeros(1, dtype=torch.uint64, device=device)
    try:
        TritonKernels().drop(x, 1.0, seed, 1.0, x)
        return "" if not x.any() else "a Triton kernel returned a wrong result"
    except (RuntimeError, OSError, subprocess.SubprocessError, TritonError) as failed:  # for example, no C compiler
        return f"Triton cannot compile and run kernels: {type(failed).__name__}: {failed}"


def _tiles(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Return the grid for the rows of x (N, d), and the tile sizes and options of each program."""
    width = triton.next_power_of_2(x.shape[1])
    rows = max(TILE // width, 1)
    return (triton.cdiv(len(x), rows),), {"ROWS": rows, "WIDTH": width, "num_warps": _warps(rows * width), **OPTIONS}


def _low_rank(x: Tensor, a: Tensor, p: float) -> tuple[int, int, int, int]:
    """Return the rows and columns of x (N, n), the rank of `a` (r, n), and the dropout threshold."""
    return *x.shape, len(a), round(p * 2**24)


def _sizes(a: Tensor) -> dict[str, Any]:
    return {**THIN, "RANK": max(triton.next_power_of_2(len(a)), 16), **OPTIONS}


def _warps(numbers: int) -> int:
    """Return the number of warps per program: enough for 16 elements per thread, but at least 1 and at most 16."""
    return min(max(numbers // 512, 1), 16)


def _blocks(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), ELEMENTWISE),)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Return a context manager that makes the device of x (any shape) current, so that kernels run on that device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
