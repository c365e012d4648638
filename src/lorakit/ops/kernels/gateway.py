"""Pass tensors to C after checking every property that a kernel assumes. No other module passes tensors to C. The C
code checks nothing: given a wrong dtype, stride or index, a kernel would silently access unrelated memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_double, c_float, c_int, c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

STATUSES: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "out of memory for a scratch buffer"),
    2: (ValueError, "the first visible position of a row is after its last"),
}
"""Error status, as in numbers.h -> exception and message; 0 is success."""

FEW = 1 << 14
"""Number of elements up to which using more than one thread costs more time than it saves."""

FARTHEST = 1 << 24
"""Distance between tokens, in elements, from which kernels with 32-bit offsets cannot be used."""

_P, _N = c_void_p, c_int64
SIGNATURES: dict[str, tuple[type, ...]] = {  # parameters as in rows.c, except the last one, the thread count
    "rms_forward": (_P, _P, c_float, c_float, _N, _N, _P, _P),
    "rms_recompute": (_P, _P, c_float, _P, _N, _N, _P),
    "rms_backward": (_P, _P, _P, c_float, _P, _P, _N, _N, _P),
    "gate": (c_int, _P, _P, _N, _P),
    "gate_backward": (c_int, _P, _P, _P, _N, _P, _P),
    "rotate": (_P, _N, _P, _P, _N, _N, _N, _N, _N, c_int, _P, _N),
    "drop": (_P, _N, c_double, c_uint64, c_float, _P),
    "softmax": (_P, _P, _P, _N, _N, _N),
    "softmax_backward": (_P, _N, _N, _P),
    "cross_entropy": (_P, _P, c_float, c_int, _N, _N, _P),
    "add_per_row": (_P, _P, _P, _P, _N, _N, _N, _N, _N, _P),
    "int8_quantize": (_P, _P, _P, _N, _N, _N, _P, _P, _P),
    "int8_output": (_P, _P, _P, _P, _P, _P, _N, _N, _N, _P),
    "int8_add": (_P, _P, _P, _P, _N, _N, _P),
    "int8_input_gradient": (_P, _P, _P, _P, _P, _P, _N, _N, _N, _P),
    "int8_few_rows": (_P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _P),
    "linear_few_rows": (_P, _P, _P, _N, _N, _N, _N, _P),
    "attend_slots": (_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, c_float, _P),
}
LAYER_SIGNATURE = (_P, _P, _P, _N, _N, _P)
"""Parameters of `decoder_layer`, which reads the addresses of its operands from memory."""


_H = (_P, _N, _N, _N)  # heads: their address, and the distances between batch rows, heads and tokens
DOT_SIGNATURES: dict[str, tuple[type, ...]] = {  # functions of libraries that have dot products
    "attend": (*_H * 4, _P, _N, _N, _N, _N, _N, c_float, c_int),
    "attend_backward": (*_H * 7, _P, _N, _N, _N, _N, _N, c_float, c_int),
    "low_rank_gradients": (_P, _P, _P, _P, _N, _N, _N, _N, _N, _P, _P, _P),
}
INT8_MATMUL_SIGNATURES: dict[str, tuple[type, ...]] = {  # functions of libraries that have int8 matmuls
    "int8_matmul_output": (*(_P,) * 9, *(_N,) * 6, _P, c_int),
    "int8_matmul_input_gradient": (*(_P,) * 7, _N, _N, _N, _N, _P, _P, c_int),
}

_ALL_WITHIN = {torch.int32: "all_within_32", torch.int64: "all_within_64"}


class Gateway:
    """The functions in rows.c for each dtype, with checks of their arguments before anything is written.

    Attributes:
        dots: Dtypes with the functions in DOT_SIGNATURES, because the processor has dot products for them.
        int8_matmuls: Dtypes with the functions in INT8_MATMUL_SIGNATURES: it has dot products of int8 and of the dtype.
        tiles: Dtypes whose functions can use matrix tiles (AMX), which the system permits.
        has_int8_dots: Whether the processor has dot products of int8 values.
        linear_rows: Dtype -> largest number of rows for which `linear_few_rows` is not slower than PyTorch, or 0.
    """

    def __init__(self, libraries: dict[torch.dtype, ctypes.CDLL]) -> None:
        self._functions = {
            dtype: {name: _typed(library, name, (*types, c_int)) for name, types in SIGNATURES.items()}
            for dtype, library in libraries.items()
        }
        for dtype, library in libraries.items():
            self._functions[dtype]["decoder_layer"] = _typed(library, "decoder_layer", (*LAYER_SIGNATURE, c_int))
        self.dots = self._add("has_dots", DOT_SIGNATURES, libraries)
        self.int8_matmuls = self._add("has_int8_matmuls", INT8_MATMUL_SIGNATURES, libraries)
        self.tiles = self._add("has_tiles", {}, libraries)
        library = next(iter(libraries.values()))
        self.has_int8_dots = bool(_typed(library, "has_int8_dots", ())())
        # after has_tiles, which asks the system for the tiles
        self.linear_rows = {dtype: _typed(each, "most_linear_rows", ())() for dtype, each in libraries.items()}
        self._all_within = {dtype: _typed(library, name, (_P, _N, _N, _N)) for dtype, name in _ALL_WITHIN.items()}

    def _add(
        self, has: str, signatures: dict[str, tuple[type, ...]], libraries: dict[torch.dtype, ctypes.CDLL]
    ) -> frozenset[torch.dtype]:
        """Add functions of the libraries whose function `has` returns 1; return the dtypes of these libraries."""
        dtypes = frozenset(dtype for dtype, library in libraries.items() if _typed(library, has, ())())
        for dtype in dtypes:
            functions = {name: _typed(libraries[dtype], name, (*types, c_int)) for name, types in signatures.items()}
            self._functions[dtype].update(functions)
        return dtypes

    def pointer(
        self,
        name: str,
        tensor: Tensor,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        within: tuple[int, int] | None = None,
    ) -> int:
        """Check a CPU tensor (any shape) against a dtype, a shape, strides and the range `within`; return its address.

        Raises:
            ValueError: A property is wrong, the tensor has no storage or, without `strides`, is not contiguous.
        """
        is_laid_out = tensor.is_contiguous() if strides is None else tensor.stride() == strides
        if not is_laid_out or tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu:
            layout = "contiguous" if strides is None else f"with strides {strides}"
            raise ValueError(
                f"{name}: expected {dtype} {tuple(shape)}, {layout}, on cpu; "
                f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
        address = tensor.data_ptr()
        if not address and tensor.numel():
            raise ValueError(f"{name}: {dtype} {tuple(shape)} has no storage")
        if within is not None and not self._all_within[dtype](address, tensor.numel(), *within):
            least, most = (int(each) for each in tensor.aminmax())
            raise ValueError(f"{name}: integers must be in {within[0]}..{within[1]}; got {least}..{most}")
        return address

    def heads(
        self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], least: int = 0
    ) -> tuple[int, ...]:
        """Check a tensor (B, H, T, D) whose heads are contiguous, and return its address and the first three strides.

        `least` is the smallest allowed stride: 1 for a tensor that is written, whose elements must not share memory.

        Raises:
            ValueError: As for `pointer`, or a stride is too short, or too long for the kernel's 32-bit offsets.
        """
        apart = tensor.stride()[:3]
        if not apart or min(apart) < least or apart[-1] >= FARTHEST:
            raise ValueError(f"{name}: strides must be {least}..{FARTHEST - 1}; got {tensor.stride()}")
        return self.pointer(name, tensor, dtype, shape, (*apart, 1)), *apart

    def optional(
        self,
        name: str,
        tensor: Tensor | None,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        within: tuple[int, int] | None = None,
    ) -> int | None:
        """Return the result of `pointer` for a contiguous tensor (any shape), or None if the tensor is None."""
        return None if tensor is None else self.pointer(name, tensor, dtype, shape, None, within)

    def call(self, name: str, dtype: torch.dtype, size: int, *args: float | None) -> None:
        """Call a C function, using more than one thread if `size`, the number of elements, exceeds `FEW`.

        Raises:
            ValueError: The dtype has no kernel, or an exception of STATUSES, after which the outputs are undefined.
        """
        if dtype not in self._functions:
            raise ValueError(f"{name}: no kernel for {dtype}")
        status = self._functions[dtype][name](*args, torch.get_num_threads() if size > FEW else 1)
        if status:
            error, what = STATUSES[status]
            raise error(f"{name}: {what}")


def _typed(library: ctypes.CDLL, name: str, types: tuple[type, ...]) -> Callable[..., int]:
    function = library[name]
    function.argtypes, function.restype = types, c_int
    return function
