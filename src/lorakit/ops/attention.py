"""Grouped-query attention with packing, sliding windows and soft caps, forward and backward without autograd."""

from __future__ import annotations

import functools
import itertools
from typing import get_args

import torch
from torch import Tensor

from lorakit.ops import attention_flash, attention_products, choices
from lorakit.ops.attention_pattern import Method, Operands, Pattern
from lorakit.ops.autograd import without_autocast
from lorakit.ops.kernels import kernels_for
from lorakit.ops.kernels.compiled_matmuls import CompiledAttention

# On a CPU, PyTorch's flash kernel is used if the longest sequence has at least this many tokens. On processors without
# matrix units, matmuls are faster even beyond 4096 tokens; with matrix units, the kernel's cache blocking pays off
# at shorter lengths.
FLASH_FROM = 2048


def chosen(q: Tensor, v: Tensor, pattern: Pattern) -> str:
    """Return the attention method for a pattern, q (B, H, T, D) and v (B, KV, T, E); never "auto".

    Raises:
        ValueError: The method is unknown, or is "flash" and the flash kernels do not support the pattern.
    """
    if pattern.method not in get_args(Method):
        raise ValueError(f"method is {pattern.method!r}; it must be one of {', '.join(get_args(Method))}")
    possible = attention_flash.takes(q, v, pattern)
    if pattern.method == "flash" and not possible:
        raise ValueError(
            "method='flash' does not support this pattern: flash kernels do not support a softcap or dropout, and v "
            "must have the same width as q; on a CPU, they do not support a window either; on CUDA, they do not "
            "support a bias or sinks, and they require fp16 or bf16. Use method='auto' or method='matmul'"
        )
    if pattern.method == "matmul_fp32" and q.dtype == torch.float64:
        return "matmul"  # fp32 would be narrower
    if pattern.method != "auto":
        return pattern.method
    if q.device.type == "cuda":
        return "flash" if possible else "matmul"
    longest = max((0, *pattern.lengths(q.shape[2])))
    usual = "flash" if longest >= FLASH_FROM else "matmul"
    method = choices.attention_method(q, v, pattern.causal, longest, usual)
    return method if possible or method != "flash" else "matmul"


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute attention, softmax(scale·q·kᵀ)·v. [docs/math.md (81), (86)]

    Shapes: q (B, H, T, D), k (B, KV, T, D) and v (B, KV, T, E), with any strides, where KV divides H.

    Returns the output (B, H, T, E), stored as (B, T, H, E); for flash, the log-sum-exp of each row, in fp32 or wider
    and in the kernel's layout, otherwise None; and the dropout record (a seed or a mask) for the weights, or None.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. (1); grouped queries: Ainslie et al. 2023, arXiv:2305.13245;
    recomputed weights: Rabe and Staats 2021, arXiv:2112.05682; sinks: Xiao et al. 2023, arXiv:2309.17453.
    """
    pattern.check(q)
    method = chosen(q, v, pattern)
    with without_autocast(q):
        if method == "flash":
            run = attention_flash.forward_on_cuda if q.device.type == "cuda" else attention_flash.forward
            return *run(q, k, v, pattern), None
        kernel = kernel_for(q, k, v, pattern) if method == "matmul" else None
        if kernel is not None:
            return kernel_forward(kernel, (q, k, v), pattern), None, None
        operands = _upcast((q, k, v)) if method == "matmul_fp32" else (q, k, v)
        out, record = attention_products.forward(*operands, pattern)
        return out.to(q.dtype), None, record


def backward(
    dout: Tensor,
    operands: Operands,
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
    pattern: Pattern,
    into: Operands | None = None,
) -> Operands:
    """Return the gradients of q, k and v, written to `into` or to new tensors by token. [docs/math.md (82)]

    Shapes: dout, of the output, (B, H, T, E); q (B, H, T, D), k (B, KV, T, D), v (B, KV, T, E). `saved` is the result
    of `forward`; its output may be None if its log-sum-exp is None.
    """
    q, k, v = operands
    into = into or (_stored_by_token(q), _stored_by_token(k), _stored_by_token(v))
    out, lse, record = saved
    with without_autocast(dout):
        if lse is None or out is None:
            _by_products(dout, operands, into, pattern, record)
        else:
            run = attention_flash.backward_on_cuda if dout.device.type == "cuda" else attention_flash.backward
            run(dout, operands, (out, lse), into, pattern)
    return into


def kernel_for(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> CompiledAttention | None:
    """Return the kernel for q (B, H, T, D), k (B, KV, T, D) and v (B, KV, T, E), or None if it must not be used."""
    kernels = kernels_for(q, strided=True)
    attention = None if kernels is None else kernels.attention
    if attention is None or q.numel() == 0 or not attention.supports(q, k, v):
        return None
    extra = (pattern.softcap, pattern.bias, pattern.sinks)
    if any(each is not None for each in extra) or pattern.dropout or pattern.windowed(q.shape[2]):
        return None
    tasks = len(q) * k.shape[1] * len(pattern.lengths(q.shape[2]))
    return attention if tasks >= torch.get_num_threads() else None


def kernel_forward(kernel: CompiledAttention, operands: Operands, pattern: Pattern) -> Tensor:
    """Return softmax(scores)·v (B, H, T, D), stored as (B, T, H, D)."""
    q, *_ = operands
    batch, heads, tokens, width = q.shape
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    kernel.attend(operands, _ends(pattern.lengths(tokens)), pattern.scale_for(width), pattern.causal, out)
    return out


def kernel_backward(
    kernel: CompiledAttention, dout: Tensor, operands: Operands, into: Operands, pattern: Pattern
) -> None:
    """Write the gradients of q (B, H, T, D), k and v (B, KV, T, D) to `into`, given that of the output, `dout`."""
    *_, tokens, width = operands[0].shape
    dout = dout if dout.stride(3) == 1 and min(dout.stride()) >= 0 else dout.contiguous()
    ends, scale = _ends(pattern.lengths(tokens)), pattern.scale_for(width)
    kernel.attend_backward(operands, dout, ends, scale, pattern.causal, into)


@functools.lru_cache(maxsize=64)  # all layers of a model request the same ends
def _ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int64)


def _by_products(dout: Tensor, operands: Operands, into: Operands, pattern: Pattern, record: Tensor | None) -> None:
    """Compute the gradients for `backward` with matmuls, in fp32 if the forward pass upcast its operands."""
    if chosen(*operands[::2], pattern) != "matmul_fp32":
        kernel = kernel_for(*operands, pattern)
        if kernel is not None:
            kernel_backward(kernel, dout, operands, into, pattern)
        else:
            attention_products.backward(dout, operands, into, pattern, record)
        return
    q, k, v = (_stored_by_token(t, torch.float32) for t in operands)
    attention_products.backward(dout.float(), _upcast(operands), (q, k, v), pattern, record)
    for grad, wide in zip(into, (q, k, v), strict=True):
        grad.copy_(wide)


def _upcast(tensors: Operands) -> Operands:
    q, k, v = (t.float() for t in tensors)
    return q, k, v


def _stored_by_token(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor with the shape of x (B, H, T, D), stored as (B, T, H, D)."""
    batch, heads, tokens, width = x.shape
    return torch.empty(batch, tokens, heads, width, dtype=dtype or x.dtype, device=x.device).transpose(1, 2)


def kept_weights(q: Tensor, k: Tensor, v: Tensor, record: Tensor | None, pattern: Pattern) -> Tensor | None:
    """Return a mask (B, H, T, T): 1 for the weights that a dropout record of `forward` keeps; None without a record."""
    if record is None:
        return None
    upcast = chosen(q, v, pattern) == "matmul_fp32"
    return attention_products.kept_weights(*((q.float(), k.float()) if upcast else (q, k)), pattern, record)
