"""Half a decoder layer as one function of autograd: norm, q, k and v, rotary positions, attention, output, residual.

Kept for the backward: x and the numbers of its norm, q and k as they are turned (before their own norms, where they
have such), v, the attention's output, (tokens, r) of each adapter, and what dropout dropped. The normalised input and
all that is elementwise is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import attention as attending
from lorakit.ops import linear, norm, rotary
from lorakit.ops.adapted import Adapted, as_written, casts, factors, refuse_trained, rows, unflat
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.dropout import join, join_backward
from lorakit.ops.linear import Group
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """What an attention block is made of.

    Attributes:
        inputs: The projections q (H·D, d), k and v (KV·D, d); or one of (H·D + 2·KV·D, d) that gives them side by side,
            or where interleaved those of one head after the other.
        output: The projection (d, H·D) of what the heads give.
        head_dim: D.
        kv_heads: KV, a divisor of H.
        norm: Of the input, or None.
        q_norm, k_norm: Of q and k before they are turned: of each head where the weight has D numbers, else of the row.
        dropout: Share of the output's numbers that become zero, before the residual.
        interleaved: The only projection gives q, k and v of the first head, then those of the next; KV = H.
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
        """Numbers of q, k and v of a token: H·D, KV·D, KV·D."""
        shared = self.kv_heads * self.head_dim
        return _out(self.inputs[0]) - (0 if len(self.inputs) == 3 else 2 * shared), shared, shared

    @property
    def projections(self) -> tuple[Adapted, ...]:
        """All projections, the output's last."""
        return (*self.inputs, self.output)

    def heads(self, parts: Sequence[Tensor], batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Views of q, k and v (B, T, heads, D) in what the projections give, (B·T, width) each."""
        if self.interleaved:
            return parts[0].view(batch, tokens, self.kv_heads, 3, self.head_dim).unbind(3)
        split = parts[0].split(self.widths, -1) if len(parts) == 1 else parts
        return tuple(part.view(batch, tokens, -1, self.head_dim) for part in split)

    def check(self) -> None:
        """That the parts fit each other and are frozen.

        Raises:
            ValueError: They do not, or a weight of the base asks for a gradient.
        """
        q, shared, _ = self.widths
        widths = [_out(part) for part in self.inputs]
        if (
            len(widths) not in (1, 3)
            or q <= 0
            or q % max(shared, 1)
            or (len(widths) == 3 and widths[1:] != [shared] * 2)
        ):
            raise ValueError(
                f"projections of {widths} numbers make no heads of {self.head_dim} with {self.kv_heads} of k and v: "
                "give q, k and v, or one projection that has them side by side"
            )
        if self.interleaved and (len(widths) != 1 or q != shared):
            raise ValueError(
                f"heads of q, k and v are interleaved in one projection with as many of each, not {widths}"
            )
        for name, own, width in (("q_norm", self.q_norm, q), ("k_norm", self.k_norm, shared)):
            size = None if own is None or own.weight is None else tuple(own.weight.shape)
            if size not in (None, (self.head_dim,), (width,)):
                raise ValueError(f"{name} has a weight {size}; it takes ({self.head_dim},), of a head, or ({width},)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout of an attention's output is at least 0 and below 1; it is {self.dropout}")
        if torch.is_grad_enabled():
            refuse_trained(self.projections)
            for own in (self.norm, self.q_norm, self.k_norm):
                norm.refuse_trained_norm(own)


def reference(
    x: Tensor,
    block: SelfAttention,
    pattern: Pattern,
    turn: Rotary | None,
    residual: bool,
    wanted: Tensor | None = None,
) -> Tensor:
    """What `attention_block` computes of x (B, T, d), in plain PyTorch and without dropout -> (B, T, d) or (n, d)."""
    n = x if block.norm is None else norm.reference(x, block.norm)
    parts = [part.flatten(0, 1) for part in linear.reference(n, block.inputs)]
    heads = []
    for part, own in zip(block.heads(parts, *x.shape[:2]), (block.q_norm, block.k_norm, None), strict=True):
        if own is not None:
            rows_of_it = part.flatten(2).unflatten(-1, (-1, _norm_width(own, block)))
            part = norm.reference(rows_of_it, own).view(part.shape)
        heads.append(part.transpose(1, 2))
    if turn is not None:
        heads[:2] = (rotary.reference(part, turn) for part in heads[:2])
    out = attending.reference(heads[0], heads[1], heads[2], pattern)
    y = linear.reference(out.transpose(1, 2).flatten(2), [block.output])[0]
    y = x + y if residual else y
    return y if wanted is None else y.flatten(0, 1)[wanted]


def attention_block(
    x: Tensor,
    block: SelfAttention,
    pattern: Pattern | None = None,
    turn: Rotary | None = None,
    residual: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """Attention with all that is around it: [docs/math.md (83)]. x (B, T, d) -> (B, T, d), or (n, d) where wanted.

    block: the projections with their adapters, and the norms; pattern: who sees whom; turn: the tables of rotary
    positions, or None; residual: add x; wanted: which of the B·T tokens go through the output projection, sorted (n,),
    or None for all. Gradients go to x and to the factors A and B.

    Raises:
        ValueError: Shapes do not fit, a weight of the base asks for a gradient, or the pattern has no way.
    """
    pattern = Pattern() if pattern is None else pattern
    if x.dim() != 3:
        raise ValueError(f"attention_block takes x (batch, tokens, width), and was given {tuple(x.shape)}")
    block.check()
    if casts(x):
        return _under_autocast(x, block, pattern, turn, residual, wanted)
    form = _Form(block, pattern, turn, residual, wanted)
    flat = factors(block.projections)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat)):
        y = _AttentionBlock.apply(x, form, *flat)
    else:
        with as_written(x):
            y = _forward(x, form)[0]
    return y if wanted is not None else unflat(y, x)  # here: a view could not be changed in place


class _Form(NamedTuple):
    block: SelfAttention
    pattern: Pattern
    turn: Rotary | None
    residual: bool
    wanted: Tensor | None

    def picked(self, t: Tensor) -> Tensor:
        """The wanted of the rows t (N, width)."""
        return t if self.wanted is None or len(t) == len(self.wanted) else t.index_select(0, self.wanted)


class _Made(NamedTuple):
    """What a forward made that a backward may want."""

    stats: Sequence[Tensor]  # of the norm
    heads: tuple[Tensor, Tensor, Tensor]  # q, k, v (B, T, heads, D); of q and k before their norms, where they have any
    own: tuple[Sequence[Tensor], Sequence[Tensor]]  # numbers of these norms
    out: Tensor  # (N, H·D)
    saved: Sequence[Tensor | None]  # of attention, besides its output
    record: Tensor | None  # of the output's dropout
    groups: tuple[Group, Group]


def _under_autocast(
    x: Tensor, block: SelfAttention, pattern: Pattern, turn: Rotary | None, residual: bool, wanted: Tensor | None
) -> Tensor:
    """As autocast has it: the norm and the residual in the dtype of x, what is between them in autocast's."""
    dtype = torch.get_autocast_dtype(x.device.type)
    n = x if block.norm is None else norm.normalised(x, block.norm)
    with as_written(x):
        y = attention_block(n.to(dtype), replace(block, norm=None), pattern, turn, wanted=wanted)
    if residual:
        y = (x if wanted is None else x.flatten(0, 1).index_select(0, wanted)) + y
    return y


def _forward(x: Tensor, form: _Form) -> tuple[Tensor, _Made]:
    """The output rows (N or as many as are wanted, d), and what was made on the way."""
    block, pattern, turn, residual, _ = form
    flat, (batch, tokens, _) = rows(x), x.shape
    n, stats = (flat, ()) if block.norm is None else block.norm.forward(flat)
    ins = Group.of(block.inputs, n)
    parts = ins.forward(n)
    del n
    q, k, v = raw = block.heads(parts, batch, tokens)
    (q, q_stats), (k, k_stats) = _normalised(q, block.q_norm, block), _normalised(k, block.k_norm, block)
    if turn is not None:
        rotary.check(q.transpose(1, 2), turn)
        q, k = rotary.turned(q, turn), rotary.turned(k, turn)
    if len(parts) == 1 and turn is not None and block.q_norm is None:
        v = v.contiguous()  # as a view it would keep q and k as they were before the turn
    del parts
    out, *saved = attending.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), pattern)
    given = out.transpose(1, 2).view(len(flat), -1)
    read = form.picked(given)
    outs = Group.of([block.output], read)
    y, record = join(outs.forward(read)[0], form.picked(flat) if residual else None, block.dropout)
    kept = raw[0] if block.q_norm else q, raw[1] if block.k_norm else k, v
    return y, _Made(stats, kept, (q_stats, k_stats), given, saved, record, (ins, outs))


def _normalised(part: Tensor, own: Norm | None, block: SelfAttention) -> tuple[Tensor, Sequence[Tensor]]:
    """A norm of q or k (B, T, heads, D), of each head or of the row, and the numbers of what it normalised."""
    if own is None:
        return part, ()
    n, stats = own.forward(_rows(part, own, block))
    return n.view(part.shape), stats


def _rows(part: Tensor, own: Norm, block: SelfAttention) -> Tensor:
    return part.reshape(-1, _norm_width(own, block)).contiguous()


def _norm_width(own: Norm, block: SelfAttention) -> int:
    return block.head_dim if own.weight is None else own.weight.numel()


def _out(part: Adapted) -> int:
    return part.W.shape[1 if part.transposed else 0]


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: _Form, *flat: Tensor | None) -> Tensor:
        with as_written(x):
            y, made = _forward(x, form)
        ins, outs = made.groups
        # where neither x nor a projection of it is trained, nothing goes back through the attention
        ctx.deep = ctx.needs_input_grad[0] or any(A or B for A, B in ins.trains)
        wants_x = ins.needs_x or (form.block.norm is not None and ctx.needs_input_grad[0])
        whole = ctx.deep and made.saved[0] is not None  # for attention's own backward
        out = made.out if whole else form.picked(made.out) if outs.needs_x else None
        (ctx.ins, inputs), (ctx.outs, output) = ins.pack(), outs.pack()
        through = [[x if wants_x else None, *made.saved], made.heads, made.stats, *made.own, inputs]
        parts = [[out, made.record], output, *(through if ctx.deep else ())]
        ctx.form, ctx.shape, ctx.counts = form, x.shape, [len(part) for part in parts]
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        tensors, form, wanted = iter(ctx.saved_tensors), ctx.form, ctx.form.wanted
        (out, record), output, *through = ([next(tensors) for _ in range(count)] for count in ctx.counts)
        with as_written(dy):
            dy = rows(dy)
            dlast = join_backward(dy, record, form.block.dropout)
            read = None if out is None else form.picked(out)
            given, last = Group.unpack(ctx.outs, output).backward(read, [dlast], need_dx=ctx.deep)
            if given is None:
                return (None, None, *(None for _ in form.block.inputs for _ in range(2)), *last[0])
            (x, *saved), heads, stats, q_stats, k_stats, inputs = through
            if wanted is not None:
                given = given.new_zeros(heads[0].shape[:2].numel(), given.shape[1]).index_copy_(0, wanted, given)
            dparts = _back_to_projections(given, heads, (q_stats, k_stats), (out, *saved), form)
            del given, dlast, read
            ins, own = Group.unpack(ctx.ins, inputs), form.block.norm
            flat = None if x is None else rows(x)
            n = own.again(flat, stats) if own is not None and ins.needs_x else flat
            dx, grads = ins.backward(n, dparts, ctx.needs_input_grad[0], owned=own is not None and ins.needs_x)
            if dx is not None:
                add = dy if form.residual and wanted is None else None
                dx = norm.back_through(own, dx, flat, stats, add)
                if form.residual and wanted is not None:
                    dx.index_add_(0, wanted, dy)
                dx = dx.view(ctx.shape)
        return (dx, None, *(grad for pair in (*grads, *last) for grad in pair))


def _back_to_projections(
    given: Tensor,
    heads: Sequence[Tensor],
    stats: tuple[Sequence[Tensor], Sequence[Tensor]],
    saved: tuple[Tensor | None, ...],  # the attention's output, and what it gave besides
    form: _Form,
) -> list[Tensor]:
    """The gradients of what the projections gave, (N, width) each, from that of the attention's output (N, H·D)."""
    block, pattern, turn, *_ = form
    shape = (*heads[0].shape[:2], -1, block.head_dim)
    owns = (block.q_norm, block.k_norm, None)
    operands = [_as_attended(*three, form) for three in zip(heads, (*stats, ()), owns, strict=True)]
    if len(block.inputs) == 1:
        made = [given.new_empty(len(given), sum(block.widths))]
    else:
        made = [given.new_empty(len(given), width) for width in block.widths]
    by_head = block.heads(made, *shape[:2])
    # only with what flash gave besides is the output asked for, and whole
    out = None if saved[0] is None or saved[1] is None else saved[0].view(shape).transpose(1, 2)
    dq, dk, dv = (grad.transpose(1, 2) for grad in by_head)
    q, k, v = (operand.transpose(1, 2) for operand in operands)
    kept = (out, saved[1], saved[2])
    attending.backward(given.view(shape).transpose(1, 2), (q, k, v), kept, pattern, (dq, dk, dv))
    for grad, raw, own_stats, own in zip(by_head[:2], heads, stats, owns, strict=False):
        if turn is not None:
            rotary.turn_back_(grad, turn)
        if own is not None:
            grad.copy_(own.backward(_rows(grad, own, block), _rows(raw, own, block), own_stats).view(grad.shape))
    return made


def _as_attended(part: Tensor, stats: Sequence[Tensor], own: Norm | None, form: _Form) -> Tensor:
    """q, k or v (B, T, heads, D) as attention took it; those with a norm were kept as they were before it."""
    if own is None:
        return part
    n = own.again(_rows(part, own, form.block), stats).view(part.shape)
    return n if form.turn is None else rotary.turned(n, form.turn)
