"""Which compiled kernels a call may use, if any."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.ops.kernels import compiled, triton
from lorakit.ops.kernels.protocol import Kernels


def kernels_for(x: Tensor, *others: Tensor | None, strided: bool = False) -> Kernels | None:
    """The compiled kernels for x (any shape), or None where PyTorch's own operations have to do.

    That is so for other dtypes than theirs, where one of the others has another dtype or device than x, for tensors
    that are not contiguous (x may be, where strided) or have no storage to point to (fake ones, shards), and under a
    compiler or tracer.
    """
    if type(x) not in _PLAIN or x.dtype not in _DTYPES.get(x.device.type, ()):
        return None
    if torch.compiler.is_compiling() or is_traced() or not (strided or x.is_contiguous()):
        return None
    for other in others:
        if other is not None and (
            type(other) not in _PLAIN or other.dtype != x.dtype or other.device != x.device or not other.is_contiguous()
        ):
            return None
    return compiled.kernels() if x.device.type == "cpu" else triton.kernels(x.device)


_DTYPES = {"cpu": tuple(compiled.DTYPES), "cuda": triton.DTYPES}
_PLAIN = (Tensor, nn.Parameter)


def is_traced() -> bool:
    """Whether tensors may stand for others now: under `torch.jit.trace`, an export, or a transform of `torch.func`."""
    return torch._C._get_tracing_state() is not None or torch._C._functorch.maybe_current_level() is not None
