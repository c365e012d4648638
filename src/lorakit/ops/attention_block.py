"""Fused attention sublayer as one autograd function: norm, q/k/v, RoPE, attention, output projection, residual.

Saved are x and its norm statistics, q and k after rotation (before it and their own norms, if they have any), v, the
attention output, one (tokens, r) activation per adapter, and dropout records. The rest is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops import attention as attending
from lorakit.ops import linear, norm, reference, rotary
from lorakit.ops.adapted import Adapted, aliased, check_frozen, factors
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.autograd import (
    Context,
    Replayed,
    edge_of,
    entered,
    is_cast_by_autocast,
    needs_gradient,
    rows,
    unflat,
    with_replay,
    without_autocast,
)
from lorakit.ops.dropout import dropout_add, dropout_add_backward, kept_elements
from lorakit.ops.linear import Group
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """Modules and options of an attention sublayer.

    Attributes:
        inputs: The projections to q (H·D, d), k (KV·D, d) and v (KV·D, d); or one fused projection (H·D + 2·KV·D, d).
        output: The output projection (d, H·D).
        head_dim, kv_heads: Head width D, and number of key and value heads KV, a divisor of H.
        norm: Norm applied to the input, or None.
        q_norm, k_norm: Norms before rotation, or None: per head if the weight has D elements, else over the whole row.
        dropout: Dropout probability for the output, before the residual is added.
        interleaved: Whether a fused projection outputs q, k and v of one head, then those of the next; requires KV = H.
    """

    inputs: tuple[Adapted, ...]
    output: Adapted
    head_dim: int
    kv_heads: int
    norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    dropout: float = 0.0
    interleaved: bool = False

    @property
    def widths(self) -> tuple[int, int, int]:
        """Return the widths H·D, KV·D and KV·D of q, k and v for one token."""
        shared = self.kv_heads * self.head_dim
        return self.inputs[0].out_features - (0 if len(self.inputs) == 3 else 2 * shared), shared, shared

    @property
    def projections(self) -> tuple[Adapted, ...]:
        """Return all projections, with the output projection last."""
        return (*self.inputs, self.output)

    def heads(self, parts: Sequence[Tensor], batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Return q, k and v (B, T, heads, D) as views of the projection outputs (B·T, width)."""
        if self.interleaved:
            return parts[0].view(batch, tokens, self.kv_heads, 3, self.head_dim).unbind(3)
        split = parts[0].split(self.widths, -1) if len(parts) == 1 else parts
        return tuple(part.view(batch, tokens, -1, self.head_dim) for part in split)

    def check(self) -> None:
        """Check that the modules are frozen and that their shapes match.

        Raises:
            ValueError: Widths do not match, an option is out of range, or a base weight requires a gradient.
        """
        q, shared, _ = self.widths
        widths = [part.out_features for part in self.inputs]
        if widths[1:] not in ([], [shared, shared]) or q <= 0 or q % max(shared, 1):
            raise ValueError(
                f"projections of widths {widths} do not match head_dim={self.head_dim} and kv_heads={self.kv_heads}: "
                "pass three projections (q, k and v) or one fused projection"
            )
        if self.interleaved and (len(widths) != 1 or q != shared):
            raise ValueError(f"interleaved q, k and v require one fused projection and equal widths; got {widths}")
        for name, own_norm, width in (("q_norm", self.q_norm, q), ("k_norm", self.k_norm, shared)):
            size = None if own_norm is None else tuple(own_norm.weight.shape)
            if size not in (None, (self.head_dim,), (width,)):
                raise ValueError(
                    f"{name}: weight must have shape ({self.head_dim},) for one head or ({width},) for all heads; "
                    f"got {size}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"attention output dropout must be in [0, 1); got {self.dropout}")
        if torch.is_grad_enabled():
            check_frozen(self.projections)
            for own_norm in (self.norm, self.q_norm, self.k_norm):
                norm.check_frozen_norm(own_norm)


def attention_block(
    x: Tensor,
    block: SelfAttention,
    pattern: Pattern | None = None,
    rope: Rotary | None = None,
    residual: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """Compute a fused attention sublayer: (B, T, d), or (n, d) if `wanted` is given. [docs/math.md (83)]

    Args:
        x: Hidden states (B, T, d); it and the factors A and B get gradients.
        block: Projections with their adapters, and norms.
        pattern: Attention pattern; None means causal.
        rope: Tables for rotary position embeddings, or None.
        residual: Whether to add x to the output.
        wanted: Sorted indices (n,) of the tokens, out of all B·T, for the output projection; None means all.

    Raises:
        ValueError: Shapes do not match, a base weight requires a gradient, or no method supports the pattern.
    """
    pattern = Pattern() if pattern is None else pattern
    if x.dim() != 3:
        raise ValueError(f"attention_block expects x (batch, tokens, width); got {tuple(x.shape)}")
    block.check()
    form = _Form(block, pattern, rope, residual, wanted)
    if is_cast_by_autocast(x):
        return _under_autocast(x, form)
    flat = factors(block.projections)
    if needs_gradient(x, *flat):
        edge = None if form.needs_x(x.requires_grad) else edge_of(x)
        y = _AttentionBlock.apply(x, form, edge, *flat)
    else:
        with without_autocast(x):
            y = _forward(x, form)[0]
    # reshaped outside the autograd function, because its outputs must not be views if callers modify them in place
    return unflat(y, x) if wanted is None else y


class _Form(NamedTuple):
    block: SelfAttention
    pattern: Pattern
    rope: Rotary | None
    residual: bool
    wanted: Tensor | None

    def needs_x(self, needs_dx: bool) -> bool:
        """Return whether the backward pass needs x."""
        trains_a = any(one.low is not None and one.low.A.requires_grad for one in self.block.inputs)
        return trains_a or (needs_dx and self.block.norm is not None)

    def picked(self, t: Tensor) -> Tensor:
        """Return only the `wanted` rows of t (N, width)."""
        return t if self.wanted is None or len(t) == len(self.wanted) else t.index_select(0, self.wanted)


class _Intermediates(NamedTuple):
    """Intermediate results of a forward pass that its backward pass may need."""

    stats: Sequence[Tensor]  # row statistics of the norm
    heads: tuple[Tensor, Tensor, Tensor]  # q, k, v (B, T, heads, D); q and k before their norms, if they have any
    own: tuple[Sequence[Tensor], Sequence[Tensor]]  # statistics of the q and k norms
    out: Tensor  # (N, H·D)
    saved: Sequence[Tensor | None]  # results of `attention.forward` other than the output
    record: Tensor | None  # dropout record for the output
    groups: tuple[Group, Group]


def _under_autocast(x: Tensor, form: _Form) -> Tensor:
    """Run the sublayer in the autocast dtype, except for the norm and the residual, which use the dtype of x."""
    block, pattern, rope, residual, wanted = form
    dtype = torch.get_autocast_dtype(x.device.type)
    n = x if block.norm is None else norm.normalize(x, block.norm)
    with without_autocast(x):
        y = attention_block(n.to(dtype), replace(block, norm=None), pattern, rope, wanted=wanted)
    if residual:
        y = (x if wanted is None else x.flatten(0, 1).index_select(0, wanted)) + y
    return y


def _forward(x: Tensor, form: _Form) -> tuple[Tensor, _Intermediates]:
    """Return the output, (N, d) or, if `wanted` is given, (n, d), and the intermediate results."""
    block, pattern, rope, residual, _ = form
    flat, (batch, tokens, _) = rows(x), x.shape
    n, stats = (flat, ()) if block.norm is None else block.norm.forward(flat)
    ins = Group.of(block.inputs, n)
    parts = ins.forward(n)
    del n
    q, k, v = raw = block.heads(parts, batch, tokens)
    (q, q_stats), (k, k_stats) = _normalize(q, block.q_norm), _normalize(k, block.k_norm)
    if rope is not None:
        rotary.check(q.transpose(1, 2), rope)
        q, k = rotary.rotated(q, rope), rotary.rotated(k, rope)
    if len(parts) == 1 and rope is not None and block.q_norm is None:
        v = v.contiguous()  # a view would keep the unrotated q and k alive
    del parts
    out, *saved = attending.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), pattern)
    attended = out.transpose(1, 2).view(len(flat), -1)
    read = form.picked(attended)
    outs = Group.of([block.output], read)
    y, record = dropout_add(outs.forward(read)[0], form.picked(flat) if residual else None, block.dropout)
    kept = raw[0] if block.q_norm else q, raw[1] if block.k_norm else k, v
    return y, _Intermediates(stats, kept, (q_stats, k_stats), attended, saved, record, (ins, outs))


def _normalize(part: Tensor, own_norm: Norm | None) -> tuple[Tensor, Sequence[Tensor]]:
    """Apply the q or k norm to `part` (B, T, heads, D), per head or per row; return the result and row statistics."""
    if own_norm is None:
        return part, ()
    n, stats = own_norm.forward(_rows(part, own_norm))
    return n.view(part.shape), stats


def _rows(part: Tensor, own_norm: Norm) -> Tensor:
    return part.reshape(-1, own_norm.weight.numel()).contiguous()


_State = tuple[_Form, torch.Size, list[int], linear.Form, linear.Form]
"""The form, the shape of x, the number of saved tensors in each part, and the packed input and output groups."""


def _replay(ctx: Context[_State], saved: Sequence[Tensor]) -> Replayed:
    tensors, (form, shape, counts, ins_form, outs_form) = iter(saved), ctx.state
    (edge, out, record), output, *through = ([next(tensors) for _ in range(count)] for count in counts)
    block, dtype, (batch, tokens, _) = form.block, ins_form.dtype, shape
    count = batch * tokens if form.wanted is None else len(form.wanted)
    shape_of_y = count, block.output.out_features
    drawn = reference.DrawnAttention(
        last=Group.unpack(outs_form, output).drawn(count),
        output=None if record is None else kept_elements(record, shape_of_y, block.dropout, dtype),
    )
    x: Tensor | None = None
    attended: Tensor | None = out
    if through:
        (x, _, of_weights), heads, _, _, _, inputs = through
        q, k, v = (part.transpose(1, 2) for part in heads)
        drawn = drawn._replace(
            inputs=Group.unpack(ins_form, inputs).drawn(batch * tokens),
            heads=heads if x is None else None,
            weights=attending.kept_weights(q, k, v, of_weights, form.pattern),
        )
    elif attended is not None:
        drawn = drawn._replace(attended=attended)
    else:  # nothing depends on the output of the attention, except a low-rank activation that is given
        width = block.output.in_features
        drawn = drawn._replace(attended=torch.zeros(count, width, dtype=dtype, device=block.output.W.device))
    entering = entered(x, edge, shape, (dtype, block.output.W.device))
    sites, inputs_of_factors = aliased(block.projections)
    block = replace(block, inputs=tuple(sites[:-1]), output=sites[-1])
    _, pattern, rope, residual, wanted = form
    y = reference.attention_block(entering, block, pattern, rope, residual, wanted, drawn)
    return (entering, None, None, *inputs_of_factors), (y.view(count, -1),)


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_State], x: Tensor, form: _Form, edge: Tensor | None, *flat: Tensor | None) -> Tensor:
        with without_autocast(x):
            y, results = _forward(x, form)
        ins, outs = results.groups
        (ins_form, inputs), (outs_form, output) = ins.pack(), outs.pack()
        # if neither x nor any input projection needs a gradient, no gradient flows through the attention computation
        deep = ctx.needs_input_grad[0] or ins_form.is_trained
        wants_x = form.needs_x(ctx.needs_input_grad[0])
        whole = deep and results.saved[0] is not None  # the attention backward pass needs the full output
        out = results.out if whole else form.picked(results.out) if outs.needs_x else None
        through = [[x if wants_x else None, *results.saved], results.heads, results.stats, *results.own, inputs]
        parts = [[edge, out, results.record], output, *(through if deep else ())]
        ctx.state = form, x.shape, [len(part) for part in parts], ins_form, outs_form
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))
        return y

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[_State], dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors, (form, shape, counts, ins_form, outs_form) = iter(ctx.saved_tensors), ctx.state
        (_, out, record), output, *through = ([next(tensors) for _ in range(count)] for count in counts)
        deep, wanted = ctx.needs_input_grad[0] or ins_form.is_trained, form.wanted
        with without_autocast(dy):
            dy = rows(dy)
            dlast = dropout_add_backward(dy, record, form.block.dropout)
            read = None if out is None else form.picked(out)
            dattended, last = Group.unpack(outs_form, output).backward(read, [dlast], need_dx=deep)
            if dattended is None:
                return (None, None, None, *(None for _ in form.block.inputs for _ in range(2)), *last[0])
            (x, *saved), heads, stats, q_stats, k_stats, inputs = through
            if wanted is not None:
                dattended = dattended.new_zeros(heads[0].shape[:2].numel(), dattended.shape[1]).index_copy_(
                    0, wanted, dattended
                )
            dparts = _back_to_projections(dattended, heads, (q_stats, k_stats), (out, *saved), form)
            del dattended, dlast, read
            ins, input_norm = Group.unpack(ins_form, inputs), form.block.norm
            flat = None if x is None else rows(x)
            n = norm.norm_recompute(input_norm, flat, stats) if ins.needs_x else None
            dx, grads = ins.backward(n, dparts, ctx.needs_input_grad[0], owned=input_norm is not None and ins.needs_x)
            if dx is not None:
                add = dy if form.residual and wanted is None else None
                dx = norm.norm_backward(input_norm, dx, flat, stats, add)
                if form.residual and wanted is not None:
                    dx.index_add_(0, wanted, dy)
                dx = dx.view(shape)
        return (dx, None, None, *(grad for pair in (*grads, *last) for grad in pair))


def _back_to_projections(
    dattended: Tensor,
    heads: Sequence[Tensor],
    stats: tuple[Sequence[Tensor], Sequence[Tensor]],
    saved: tuple[Tensor | None, ...],  # results of `attention.forward`, starting with the output
    form: _Form,
) -> list[Tensor]:
    """Return the gradients (N, width) of the input projections; `dattended` (N, H·D) is that of the output."""
    block, pattern, rope, *_ = form
    shape = (*heads[0].shape[:2], -1, block.head_dim)
    owns = (block.q_norm, block.k_norm, None)
    operands = [_as_attended(*three, form) for three in zip(heads, (*stats, ()), owns, strict=True)]
    if len(block.inputs) == 1:
        gradients = [dattended.new_empty(len(dattended), sum(block.widths))]
    else:
        gradients = [dattended.new_empty(len(dattended), width) for width in block.widths]
    by_head = block.heads(gradients, *shape[:2])
    # only the flash backward pass needs the full output; if flash ran, row statistics were saved too
    out = None if saved[0] is None or saved[1] is None else saved[0].view(shape).transpose(1, 2)
    dq, dk, dv = (grad.transpose(1, 2) for grad in by_head)
    q, k, v = (operand.transpose(1, 2) for operand in operands)
    kept = (out, saved[1], saved[2])
    attending.backward(dattended.view(shape).transpose(1, 2), (q, k, v), kept, pattern, (dq, dk, dv))
    for grad, raw, own_stats, own_norm in zip(by_head[:2], heads, stats, owns, strict=False):
        if rope is not None:
            rotary.rotate_back_(grad, rope)
        if own_norm is not None:
            grad.copy_(own_norm.backward(_rows(grad, own_norm), _rows(raw, own_norm), own_stats).view(grad.shape))
    return gradients


def _as_attended(part: Tensor, stats: Sequence[Tensor], own_norm: Norm | None, form: _Form) -> Tensor:
    """Return q, k or v (B, T, heads, D) as attention received it, with its own norm and the rotation recomputed."""
    if own_norm is None:
        return part
    n = own_norm.recompute(_rows(part, own_norm), stats).view(part.shape)
    return n if form.rope is None else rotary.rotated(n, form.rope)
