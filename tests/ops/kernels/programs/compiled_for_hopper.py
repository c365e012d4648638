"""Launch every kernel on CPU tensors, compile it for an H100 instead of running it, and print the names."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lorakit.ops.kernels.triton.launching import TritonKernels

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint64: "*u64",
}


def compiled(
    function: Any,
    *args: Any,
    grid: Any,
    warmup: bool = False,
    num_warps: int = 4,
    enable_fp_fusion: bool,
    **constants: Any,
) -> None:
    """Replace `JITFunction.run`."""
    given = dict(zip(function.arg_names, args, strict=False)) | constants
    constexprs = {
        name for name, parameter in zip(function.arg_names, function.params, strict=True) if parameter.is_constexpr
    }
    signature = {name: "constexpr" if name in constexprs else of(given[name]) for name in function.arg_names}
    values = {(function.arg_names.index(name),): given[name] for name in constexprs}
    made = triton.compile(
        ASTSource(function, signature, values),
        target=HOPPER,
        options={"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion},
    )
    assert made.asm["cubin"]
    print(function.fn.__name__)


def of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"


def main() -> None:
    warnings.simplefilter("error")
    JITFunction.run = compiled
    k: Any = TritonKernels()
    x, w = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    rstd, heads = torch.empty(4, 1), torch.empty(1, 4, 8, 80, dtype=torch.bfloat16)
    table = torch.empty(1, 4, 64, dtype=torch.bfloat16)
    k.rms_forward(x, w, 1e-5, 0.0, x, rstd)
    k.rms_forward(x, w, 1e-5, 1.0, x, rstd)
    k.rms_recompute(x, w, 1.0, rstd, x)
    k.rms_backward(x, x, w, 0.0, rstd, x, x)
    for act in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu"):
        k.gate_backward(act, x, x, x, x, x)
    k.gate("silu", x, x, x)
    k.rotate(heads, table, table, False, heads)
    k.rotate(heads, table, table, True, torch.empty_like(heads))
    k.drop(x, 0.05, torch.empty(1, dtype=torch.uint64), 1.0, x)
    h, seed = torch.empty(4, 16, dtype=torch.bfloat16), torch.empty(1, dtype=torch.uint64)
    k.shrink(x, x.new_empty(16, 4096), 0.05, seed)
    k.add_low_rank(h, x.new_empty(16, 4096), 0.05, seed, x)
    k.outer(h, x, 0.05, seed)
    k.cross_entropy(x, torch.empty(4, dtype=torch.int64), 1.0, True, torch.empty(4), 30.0)
    bound = torch.empty(2, dtype=torch.int32)
    k.softmax(x.view(1, 4, 4096), bound, bound)
    k.softmax_backward(x, x)


main()
