"""Reference implementations of the fused operations in plain PyTorch, each directly by its formula.

Tests compare values and gradients with them, and fused operations run them if a backward pass is differentiated again;
dropout and results that were saved instead of an input are then taken from the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.activation import QUICK
from lorakit.ops.adapted import Adapted, upcast_dtype
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.int8 import Int8Linear
from lorakit.ops.int8_weight import Int8Weight

if TYPE_CHECKING:
    from lorakit.ops.attention_block import SelfAttention
    from lorakit.ops.cross_entropy import Head
    from lorakit.ops.grouped_linear import GroupedLinear, GroupedLowRank
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


class Drawn(NamedTuple):
    """What a group of linear modules takes from a forward pass; None for what it computes itself.

    `masks` has the dropout mask (…, in) of each adapter, 1 to keep an element; `hidden` the low-rank activations
    (N, r), including the scale and the division by 1 − p.
    """

    masks: Sequence[Tensor | None] | None = None
    hidden: Sequence[Tensor | None] | None = None


def dropout(x: Tensor, p: float, keep: Tensor | None) -> Tensor:
    """Apply dropout to x (any shape) with a mask of as many elements: 1 keeps an element, 0 drops it; None is none."""
    if keep is None:
        return x
    return x * keep.view(x.shape).to(x.dtype) / (1 - p) if p < 1 else x * 0


def anchored(y: Tensor, value: Tensor | None) -> Tensor:
    """Return the values of `value`, if given, with the gradient of y (any shape); both have as many elements."""
    return y if value is None else y - y.detach() + value.detach().reshape(y.shape).to(y.dtype)


def linear(
    x: Tensor,
    group: Sequence[Adapted],
    masks: Sequence[Tensor | None] | None = None,
    hidden: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Compute `linears` for x (…, in); `masks` and `hidden` are as in `Drawn`."""
    every = [None] * len(group)
    outputs = []
    for module, mask, saved in zip(group, masks or every, hidden or every, strict=True):
        y = base(x, module)
        if module.low is not None:
            low = module.low
            h, B = F.linear(dropout(x, low.p, mask), low.A.to(x.dtype)), low.B.to(x.dtype)
            y = y + (low.scale * F.linear(h, B) if saved is None else F.linear(anchored(low.scale * h, saved), B))
        outputs.append(y)
    return outputs


def base(x: Tensor, module: Adapted) -> Tensor:
    """Apply the frozen part of a module to x (…, in)."""
    if isinstance(module.W, Int8Weight):
        return int8(x, module.W, module.bias)
    W, bias = module.W.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, W.t() if module.transposed else W, bias)


def int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute `int8_linear` with exact matmuls in float64: x (…, in)."""
    y: Tensor = Int8Linear.apply(x, weight, bias, True)
    return y


def grouped_linear(
    x: Tensor,
    counts: Sequence[int],
    linear: GroupedLinear | None,
    adapters: Sequence[GroupedLowRank] = (),
    hidden: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Compute `grouped_linear` one group at a time: x (N, in) -> (N, out); `hidden` (N, r) is as in `Drawn`."""
    saved = hidden or [None] * len(adapters)
    outputs = []
    for group, (rows, *values) in enumerate(_split(counts, x, *saved)):
        y: Tensor | float = 0.0
        if linear is not None:
            bias = None if linear.bias is None else linear.bias[group].to(x.dtype)
            y = F.linear(rows, linear.weight(group, x.dtype), bias)
        for adapter, value in zip(adapters, values, strict=True):
            A, B = adapter.A[group].to(x.dtype), adapter.B[group].to(x.dtype)
            y = y + F.linear(anchored(adapter.scale * F.linear(rows, A), value), B)
        outputs.append(torch.as_tensor(y))
    return torch.cat(outputs)


def _split(counts: Sequence[int], *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield each group's rows of tensors (N, width); None stays None."""
    parts = [[None] * len(counts) if t is None else t.split(list(counts)) for t in tensors]
    return zip(*parts, strict=True)


def segments(x: Tensor, A: Tensor, B: Tensor, scales: Tensor | None, index: Tensor) -> Tensor:
    """Compute `segmented` one row at a time: x (rows, …, in) -> (rows, …, out)."""
    rows = []
    for row, k in zip(x, index.tolist(), strict=True):
        if k < 0:
            rows.append(row.new_zeros(*row.shape[:-1], B.shape[1]))
        else:
            h = F.linear(row, A[k].to(x.dtype)) * (1.0 if scales is None else float(scales[k]))
            rows.append(F.linear(h, B[k].to(x.dtype)))
    return torch.stack(rows)


def cross_entropy(
    h: Tensor, head: Head, labels: Tensor, *, total: float | Tensor | None = None, ignore_index: int = -100
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
        return (n * (norm.offset + norm.weight.to(n.dtype))).to(x.dtype)
    return n.to(x.dtype) * norm.weight.to(x.dtype)


class DrawnMlp(NamedTuple):
    """What an MLP sublayer takes from a forward pass; None for what it computes itself. `hidden` has the gate and up
    outputs (N, f), if x was not saved; `output` and `within` are dropout masks.
    """

    inner: Drawn = Drawn()
    down: Drawn = Drawn()
    hidden: Sequence[Tensor] | None = None
    output: Tensor | None = None
    within: Tensor | None = None


def mlp(x: Tensor, form: Form, drawn: DrawnMlp | None = None) -> Tensor:
    """Compute `lorakit.ops.mlp.mlp`, without dropout unless it is given: x (..., d) -> (..., d)."""
    of_inner, of_down, saved, output, within = drawn or DrawnMlp()
    hidden = linear(x if form.norm is None else norm(x, form.norm), form.inner, *of_inner)
    parts = list(hidden[0].chunk(2, -1)) if form.fused else hidden
    values: Sequence[Tensor | None] = saved or [None] * len(parts)
    first, *up = (anchored(part, value) for part, value in zip(parts, values, strict=True))
    a = ACTIVATIONS[form.act.name](first)
    a = dropout(a * up[0] if up else a, form.within, within)
    y = dropout(linear(a, [form.down], *of_down)[0], form.dropout, output)
    return x + y if form.residual else y


def rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first rot elements of each head: x (B, H, T, D) -> (B, H, T, D)."""
    cos, sin = (table.view(-1, 1, *table.shape[-2:]).to(x.dtype) for table in (rotary.cos, rotary.sin))
    rot = cos.shape[-1]
    rotating, passing = x[..., :rot], x[..., rot:]
    turned = torch.cat((-rotating[..., rot // 2 :], rotating[..., : rot // 2]), dim=-1)
    return torch.cat((rotating * cos + turned * sin, passing), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """Compute attention: q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D); `kept` is 1 for weights to keep."""
    pattern.check(q)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * pattern.scale_for(q.shape[3])
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    if pattern.bias is not None:
        scores = scores + pattern.bias.to(scores.dtype)
    positions = torch.arange(q.shape[2], device=q.device)
    scores = scores.masked_fill(~pattern.allowed(positions, positions), -torch.inf).to(upcast_dtype(q.dtype))
    if pattern.sinks is not None:  # an additional column without a value
        column = pattern.sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., : q.shape[2]].to(q.dtype)
    return (weights if kept is None else weights * kept.to(q.dtype) / (1 - pattern.dropout)) @ v


class DrawnAttention(NamedTuple):
    """What an attention sublayer takes from a forward pass; None for what it computes itself.

    `heads` has q, k and v (B, T, heads, D) as `attention_block` saves them, if x was not saved; `attended` the output
    of attention (N, H·D), if no gradient flows through it; `weights` (B, H, T, T) and `output` are dropout masks.
    """

    inputs: Drawn = Drawn()
    last: Drawn = Drawn()
    heads: Sequence[Tensor] | None = None
    attended: Tensor | None = None
    weights: Tensor | None = None
    output: Tensor | None = None


def attention_block(
    x: Tensor,
    block: SelfAttention,
    pattern: Pattern,
    rope: Rotary | None,
    residual: bool,
    wanted: Tensor | None = None,
    drawn: DrawnAttention | None = None,
) -> Tensor:
    """Compute the attention sublayer, with dropout only if given: x (B, T, d) -> (B, T, d), or (n, d) if `wanted`."""
    drawn = drawn or DrawnAttention()
    if drawn.attended is None:
        q, k, v = _heads(x, block, rope, drawn)
        out = attention(q, k, v, pattern, drawn.weights).transpose(1, 2).flatten(2).flatten(0, 1)
    else:
        out = drawn.attended
    flat = x.flatten(0, 1)
    if wanted is not None:
        flat, out = flat[wanted], out if len(out) == len(wanted) else out[wanted]
    y = dropout(linear(out, [block.output], *drawn.last)[0], block.dropout, drawn.output)
    y = flat + y if residual else y
    return y.view(x.shape) if wanted is None else y


def _heads(x: Tensor, block: SelfAttention, rope: Rotary | None, drawn: DrawnAttention) -> list[Tensor]:
    """Return q, k and v (B, heads, T, D)."""
    n = x if block.norm is None else norm(x, block.norm)
    parts = [part.flatten(0, 1) for part in linear(n, block.inputs, *drawn.inputs)]
    owns, saved = (block.q_norm, block.k_norm, None), drawn.heads or (None, None, None)
    heads = []
    for at, (part, own_norm, value) in enumerate(zip(block.heads(parts, *x.shape[:2]), owns, saved, strict=True)):
        if own_norm is not None:
            part = anchored(part, value)
            part = norm(part.flatten(2).unflatten(-1, (-1, own_norm.weight.numel())), own_norm).view(part.shape)
        part = part.transpose(1, 2)
        part = part if rope is None or at == 2 else rotary(part, rope)
        heads.append(part if own_norm is not None or value is None else anchored(part, value.transpose(1, 2)))
    return heads
