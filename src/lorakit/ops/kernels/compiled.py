"""The kernels for CPUs: rows.c and what it includes, called with pointers.

See `lorakit.ops.kernels.protocol` for what each computes.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from lorakit.ops.kernels.building import Built, built

DTYPES = {torch.float32: "", torch.bfloat16: "BF16"}
"""Dtypes for which there are kernels -> what their source is compiled with."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "quick_gelu": 2, "relu": 3}
"""Names, as in `lorakit.ops.activation`, -> as in the source."""

FEW = 1 << 14
"""Numbers below which a second thread costs more than it saves."""


@functools.cache
def kernels() -> CompiledKernels | None:
    """The kernels of this process, compiled where that has not been done yet; None where that is not possible."""
    libraries = [each.functions for each in _built()]
    if libraries[-1] is None:
        return None
    return CompiledKernels({dtype: each for dtype, each in zip(DTYPES, libraries, strict=True) if each is not None})


def account() -> str:
    """How the kernels were made, or why there are none; for people."""
    last = _built()[-1]
    return f"kernels {last.why}" if last.functions is not None else f"PyTorch's operations ({last.why})"


def _built() -> list[Built]:
    """What was built for each dtype, up to the first that could not be, so that one reason is told once."""
    found: list[Built] = []
    for define in DTYPES.values():
        found.append(built(define))
        if found[-1].functions is None:
            break
    return found


class CompiledKernels:
    """The functions of rows.c for each dtype."""

    activations = frozenset(ACTIVATIONS)
    caps_logits = False
    dropping = None

    @property
    def own(self) -> CompiledKernels:
        """Itself."""
        return self

    def __init__(self, libraries: dict[torch.dtype, ctypes.CDLL]) -> None:
        self._functions = {
            dtype: {name: _typed(library, name, types) for name, types in _SIGNATURES.items()}
            for dtype, library in libraries.items()
        }

    def _call(self, name: str, x: Tensor, *args: Any) -> None:
        self._functions[x.dtype][name](*args, torch.get_num_threads() if x.numel() > FEW else 1)

    def rms_forward(self, x: Tensor, w: Tensor | None, eps: float, offset: float, n: Tensor, rstd: Tensor) -> None:
        """See the protocol; x, n (N, d)."""
        self._call("rms_forward", x, x.data_ptr(), _at(w), eps, offset, *x.shape, n.data_ptr(), rstd.data_ptr())

    def rms_again(self, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, n: Tensor) -> None:
        """See the protocol; x, n (N, d)."""
        self._call("rms_again", x, x.data_ptr(), _at(w), offset, rstd.data_ptr(), *x.shape, n.data_ptr())

    def rms_backward(
        self, dn: Tensor, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, add: Tensor | None, dx: Tensor
    ) -> None:
        """See the protocol; dn, x, dx (N, d)."""
        pointers = (dn.data_ptr(), x.data_ptr(), _at(w), offset, rstd.data_ptr(), _at(add))
        self._call("rms_backward", x, *pointers, *x.shape, dx.data_ptr())

    def gate(self, act: str, first: Tensor, up: Tensor | None, out: Tensor) -> None:
        """See the protocol; first, up, out (N, f)."""
        self._call("gate", first, ACTIVATIONS[act], first.data_ptr(), _at(up), first.numel(), out.data_ptr())

    def gate_backward(
        self, act: str, da: Tensor, first: Tensor, up: Tensor | None, dfirst: Tensor, dup: Tensor | None
    ) -> None:
        """See the protocol; da, first, up (N, f)."""
        pointers = (da.data_ptr(), first.data_ptr(), _at(up), first.numel(), dfirst.data_ptr(), _at(dup))
        self._call("gate_backward", first, ACTIVATIONS[act], *pointers)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, out: Tensor) -> None:
        """See the protocol; x, out (B, T, H, D)."""
        batch, tokens, heads, width = x.shape
        tables = (cos.data_ptr(), sin.data_ptr(), cos.numel() // cos.shape[-1])
        sizes = (batch * tokens, heads, width, cos.shape[-1], interleaved, back)
        self._call("turn", x, x.data_ptr(), x.stride(1), *tables, *sizes, out.data_ptr(), out.stride(1))

    def drop(self, x: Tensor, p: float, seed: Tensor, scale: float, out: Tensor) -> None:
        """See the protocol; x, out (any shape)."""
        self._call("drop", x, x.data_ptr(), x.numel(), p, seed.item(), scale, out.data_ptr())

    def softmax(self, scores: Tensor, low: Tensor | None, high: Tensor | None) -> None:
        """See the protocol; scores (Z, n, m)."""
        kinds = len(low) if low is not None else len(high) if high is not None else 1
        rows, m = scores.numel() // scores.shape[-1], scores.shape[-1]
        self._call("softmax", scores, scores.data_ptr(), _at(low), _at(high), kinds, rows, m)

    def softmax_backward(self, weights: Tensor, ds: Tensor) -> None:
        """See the protocol; weights, ds (Z, n, m)."""
        m = ds.shape[-1]
        self._call("softmax_backward", ds, weights.data_ptr(), ds.numel() // m, m, ds.data_ptr())

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, scale: float, gradients: bool, losses: Tensor, cap: float | None = None
    ) -> None:
        """See the protocol; logits (c, V)."""
        assert cap is None  # `caps_logits` says so
        pointers = (logits.data_ptr(), labels.data_ptr(), scale, gradients, *logits.shape, losses.data_ptr())
        self._call("cross_entropy", logits, *pointers)

    def add_own(self, x: Tensor, A: Tensor, Bt: Tensor, index: Tensor, y: Tensor) -> None:
        """See the protocol; x (rows, …, in), A (K, r, in), Bt (K, r, out), index (rows,), y (rows, …, out)."""
        width, (_, r, out), rows = x.shape[-1], Bt.shape, x.numel() // x.shape[-1]
        sizes = (rows // len(index), rows, width, r, out)
        threads = min(torch.get_num_threads(), rows) if rows * r * (width + out) > FEW else 1  # what is read
        pointers = (x.data_ptr(), A.data_ptr(), Bt.data_ptr(), index.data_ptr())
        self._functions[x.dtype]["add_own"](*pointers, *sizes, y.data_ptr(), threads)


_P, _N = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # as in rows.c, but for the number of threads, which is the last of all
    "rms_forward": (_P, _P, c_float, c_float, _N, _N, _P, _P),
    "rms_again": (_P, _P, c_float, _P, _N, _N, _P),
    "rms_backward": (_P, _P, _P, c_float, _P, _P, _N, _N, _P),
    "gate": (c_int, _P, _P, _N, _P),
    "gate_backward": (c_int, _P, _P, _P, _N, _P, _P),
    "turn": (_P, _N, _P, _P, _N, _N, _N, _N, _N, c_int, c_int, _P, _N),
    "drop": (_P, _N, c_double, c_uint64, c_float, _P),
    "softmax": (_P, _P, _P, _N, _N, _N),
    "softmax_backward": (_P, _N, _N, _P),
    "cross_entropy": (_P, _P, c_float, c_int, _N, _N, _P),
    "add_own": (_P, _P, _P, _P, _N, _N, _N, _N, _N, _P),
}


def _typed(library: ctypes.CDLL, name: str, types: tuple[Any, ...]) -> Any:
    function = library[name]
    function.argtypes, function.restype = (*types, c_int), None
    return function


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
