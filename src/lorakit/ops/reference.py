"""Reference implementations of the fused operations in plain PyTorch, used to test values and gradients.

Each function follows its formula directly and computes the same results as a fused operation. For example, `linear`
is the reference for `lorakit.ops.linear.linears`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.activation import QUICK
from lorakit.ops.adapted import Adapted, upcast_dtype
from lorakit.ops.attention_block import SelfAttention
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.cross_entropy import IGNORED, Head
from lorakit.ops.grouped_linear import GroupedLinear, GroupedLowRank
from lorakit.ops.int8 import reference_backward, reference_forward
from lorakit.ops.int8_weight import Int8Weight
from lorakit.ops.mlp import Form
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(QUICK * x),
    "relu": F.relu,
}


def dropout(x: Tensor, p: float, keep: Tensor) -> Tensor:
    """Apply dropout to x (any shape) with a given mask `keep` of the same shape: 1 keeps an element, 0 drops it."""
    return x * keep / (1 - p) if p < 1 else x * 0


def linear(x: Tensor, group: Sequence[Adapted], masks: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Compute `linears` for x (…, in); `masks` contains a dropout mask (…, in) or None for each module."""
    outputs = []
    for module, mask in zip(group, masks or [None] * len(group), strict=True):
        y = base(x, module)
        if module.low is not None:
            low = module.low
            kept = x if mask is None else x * mask.to(x.dtype) / (1 - low.p)
            y = y + low.scale * F.linear(F.linear(kept, low.A.to(x.dtype)), low.B.to(x.dtype))
        outputs.append(y)
    return outputs


def base(x: Tensor, module: Adapted) -> Tensor:
    """Apply the frozen part of a module to x (…, in)."""
    if isinstance(module.W, Int8Weight):
        return int8(x, module.W, module.bias)
    return F.linear(x, module.W.t() if module.transposed else module.W, module.bias)


def int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute `int8_linear` with `reference_forward` and `reference_backward`: x (…, in)."""
    y: Tensor = _Int8Linear.apply(x, weight, bias)
    return y


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.state = weight, x.shape
        return reference_forward(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        weight, shape = ctx.state
        return reference_backward(dy.flatten(0, -2), weight).view(shape), None, None


def grouped_linear(
    x: Tensor, counts: Sequence[int], linear: GroupedLinear | None, adapters: Sequence[GroupedLowRank] = ()
) -> Tensor:
    """Compute `grouped_linear` one row at a time: x (N, in) -> (N, out)."""
    of_rows = [group for group, count in enumerate(counts) for _ in range(count)]
    outputs = []
    for row, group in zip(x, of_rows, strict=True):
        y: Tensor | float = 0.0
        if linear is not None:
            W = linear.W[group].t() if linear.in_first else linear.W[group]
            y = F.linear(row, W, None if linear.bias is None else linear.bias[group])
        for adapter in adapters:
            A, B = adapter.A[group].to(x.dtype), adapter.B[group].to(x.dtype)
            y = y + adapter.scale * F.linear(F.linear(row, A), B)
        outputs.append(torch.as_tensor(y))
    return torch.stack(outputs)


def segments(x: Tensor, A: Tensor, B: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    """Compute `segmented` one row at a time: x (rows, …, in) -> (rows, …, out)."""
    rows = []
    for row, k in zip(x, index.tolist(), strict=True):
        if k < 0:
            rows.append(row.new_zeros(*row.shape[:-1], B.shape[1]))
        else:
            rows.append(float(scales[k]) * F.linear(F.linear(row, A[k].to(x.dtype)), B[k].to(x.dtype)))
    return torch.stack(rows)


def cross_entropy(
    h: Tensor, head: Head, labels: Tensor, *, total: float | Tensor | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """Compute `linear_cross_entropy` for h (..., d) and labels (...), and return the scalar loss."""
    z = F.linear(h, head.W, head.bias).to(upcast_dtype(h.dtype)) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    loss = F.cross_entropy(z.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return loss / ((labels != ignore_index).sum() if total is None else total)


def norm(x: Tensor, norm: Norm) -> Tensor:
    """Apply a norm to x (..., d), rounding at the same points as transformers."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    n = x.to(upcast_dtype(x.dtype))
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + norm.eps)
    if norm.offset:
        return (n if norm.weight is None else n * (norm.offset + norm.weight.to(n.dtype))).to(x.dtype)
    return n.to(x.dtype) if norm.weight is None else n.to(x.dtype) * norm.weight.to(x.dtype)


def mlp(x: Tensor, form: Form) -> Tensor:
    """Compute `lorakit.ops.mlp.mlp` without dropout: x (..., d) -> (..., d)."""
    hidden = linear(x if form.norm is None else norm(x, form.norm), form.inner)
    first, *up = hidden[0].chunk(2, -1) if form.fused else hidden
    a = ACTIVATIONS[form.act.name](first)
    y = linear(a * up[0] if up else a, [form.down])[0]
    return x + y if form.residual else y


def rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first rot elements of each head: x (B, H, T, D) -> (B, H, T, D)."""
    cos, sin = (table.view(-1, 1, *table.shape[-2:]).to(x.dtype) for table in (rotary.cos, rotary.sin))
    rot = cos.shape[-1]
    rotating, passing = x[..., :rot], x[..., rot:]
    if rotary.pairs == "half":
        turned = torch.cat((-rotating[..., rot // 2 :], rotating[..., : rot // 2]), dim=-1)
    else:
        turned = torch.stack((-rotating[..., 1::2], rotating[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((rotating * cos + turned * sin, passing), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """Compute attention: q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D).

    `kept` (B, H, T, T) is 1 where dropout keeps a weight and 0 where it drops one; None disables dropout.
    """
    pattern.check(q, k, v)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * pattern.scale_for(q.shape[3])
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    if pattern.bias is not None:
        scores = scores + pattern.bias.to(scores.dtype)
    seen = visible(pattern, q.shape[2], q.device)
    scores = scores.masked_fill(~seen, -torch.inf).to(upcast_dtype(q.dtype))
    if pattern.sinks is not None:  # an additional column without a value
        column = pattern.sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., : q.shape[2]].to(q.dtype)
    return (weights if kept is None else weights * kept.to(q.dtype) / (1 - pattern.dropout)) @ v


def visible(pattern: Pattern, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Return a boolean mask (T, T) whose entry (i, j) is true if token i of a row sees token j."""
    lengths = pattern.lengths(tokens)
    which = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], device=device)
    targets = torch.arange(len(which), device=device)
    distance = targets.unsqueeze(1) - targets
    seen = which.unsqueeze(1) == which
    if pattern.causal:
        seen &= distance >= 0
    if pattern.window is not None:
        seen &= distance < pattern.window if pattern.causal else distance.abs() <= pattern.window
    return seen


def attention_block(
    x: Tensor, block: SelfAttention, pattern: Pattern, rope: Rotary | None, residual: bool, wanted: Tensor | None = None
) -> Tensor:
    """Compute the attention sublayer without dropout: x (B, T, d) -> (B, T, d), or (n, d) if `wanted` is given."""
    n = x if block.norm is None else norm(x, block.norm)
    parts = [part.flatten(0, 1) for part in linear(n, block.inputs)]
    heads = []
    for part, own in zip(block.heads(parts, *x.shape[:2]), (block.q_norm, block.k_norm, None), strict=True):
        if own is not None:
            width = block.head_dim if own.weight is None else own.weight.numel()
            part = norm(part.flatten(2).unflatten(-1, (-1, width)), own).view(part.shape)
        heads.append(part.transpose(1, 2))
    if rope is not None:
        heads[:2] = (rotary(part, rope) for part in heads[:2])
    out = attention(heads[0], heads[1], heads[2], pattern)
    y = linear(out.transpose(1, 2).flatten(2), [block.output])[0]
    y = x + y if residual else y
    return y if wanted is None else y.flatten(0, 1)[wanted]
