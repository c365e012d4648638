"""Compiled kernels for the fused operations, written in C for CPUs and in Triton for CUDA; see `kernels_for`.

If no kernels are available, PyTorch operations compute the same results. All tensors of a call are on the same device
and contiguous, except that `rotate` also accepts strided tokens. N rows of width d form a tensor (N, d). In each call,
inputs and outputs have the same dtype: fp32, bf16 or, on CUDA, fp16. Row statistics and intermediate results are fp32;
intermediate results are rounded only where stated. The caller allocates outputs. An output may alias an input only
where stated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from lorakit.ops.autograd import is_traced
from lorakit.ops.kernels import compiled, triton

if TYPE_CHECKING:
    from lorakit.ops.kernels.triton.launching import TritonKernels

Kernels: TypeAlias = "compiled.CompiledKernels | TritonKernels"


def kernels_for(x: Tensor, *others: Tensor | None, strided: bool = False, is_new: bool = False) -> Kernels | None:
    """Return the compiled kernels for x (any shape), or None if PyTorch's operations must be used.

    They are not used during compilation or tracing, for other dtypes, or if a tensor differs in dtype or device, is not
    contiguous, or has no ordinary storage (fake tensors, shards). If `strided`, x need not be contiguous. If `is_new`,
    the caller created all tensors, so that they are ordinary ones in a `torch.func` transform too.
    """
    if type(x) not in _PLAIN or x.dtype not in _DTYPES.get(x.device.type, ()):
        return None
    if torch.compiler.is_compiling() or (is_traced() and not is_new) or not (strided or x.is_contiguous()):
        return None
    for other in others:
        if other is not None and (
            type(other) not in _PLAIN or other.dtype != x.dtype or other.device != x.device or not other.is_contiguous()
        ):
            return None
    return compiled.kernels() if x.device.type == "cpu" else triton.kernels(x.device)


_DTYPES = {"cpu": tuple(compiled.DTYPES), "cuda": triton.DTYPES}
_PLAIN = (Tensor, nn.Parameter)
