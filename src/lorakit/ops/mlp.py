"""The other half of a decoder layer as one function of autograd: norm, gate and up, activation, down, residual.

Kept for the backward: x and the numbers of its norm, what gate and up gave (or they multiply again), (tokens, r) of
each adapter, and what dropout dropped. The normalised input and the activation are made again, in buffers that then
become the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import linear
from lorakit.ops.activation import Activation, activate, activate_backward, activation
from lorakit.ops.adapted import Adapted, as_written, autocast, casts, factors, refuse_trained, rows, unflat
from lorakit.ops.dropout import join, join_backward
from lorakit.ops.linear import Group
from lorakit.ops.norm import Norm, back_through, normalised, refuse_trained_norm
from lorakit.ops.norm import reference as norm_reference


class Form(NamedTuple):
    """What an MLP is made of.

    Attributes:
        inner: (gate, up), or (up,) alone where nothing is multiplied, or where fused one of (2·f, d) that gives the two
            side by side.
        down: What comes after the activation.
        act: f, of the gate's output or of the only one.
        norm: Of the input, or None.
        residual: Whether x is added.
        dropout: Share of the numbers of down's output that become zero, before the residual.
        within: Share of the numbers of down's input that become zero.
        fused: Gate and up are one module.
        keep: Whether what gate and up gave is kept for the backward, else it is made again there: [docs/math.md (85)].
    """

    inner: tuple[Adapted, ...]
    down: Adapted
    act: Activation
    norm: Norm | None
    residual: bool
    dropout: float = 0.0
    within: float = 0.0
    fused: bool = False
    keep: bool = True


def gated(
    x: Tensor, norm: Norm | None, gate: Adapted, up: Adapted, down: Adapted, act: str, residual: bool = False
) -> Tensor:
    """down(act(gate(n))·up(n)) with n = norm(x), plus x where residual: [docs/math.md (79)]. x (..., d) -> (..., d).

    Gradients go to x and to the factors A and B.

    Raises:
        ValueError: The activation has no fused form, or a weight of the base asks for a gradient.

    Source: Shazeer 2020, arXiv:2002.05202, eq. (6).
    """
    return mlp(x, Form((gate, up), down, activation(act), norm, residual))


def plain(
    x: Tensor, norm: Norm | None, up: Adapted, down: Adapted, act: str, residual: bool = False, dropout: float = 0.0
) -> Tensor:
    """down(act(up(n))) with n = norm(x), plus x where residual: [docs/math.md (79)]. x (..., d) -> (..., d).

    Gradients go to x and to the factors A and B. dropout: share of down's output that becomes zero, before x is added.

    Raises:
        ValueError: The activation has no fused form, a weight of the base asks for a gradient, or the dropout leaves
            nothing.
    """
    return mlp(x, Form((up,), down, activation(act), norm, residual, dropout))


def reference(x: Tensor, form: Form) -> Tensor:
    """What `mlp` computes of x (..., d), in plain PyTorch and without dropout -> (..., d)."""
    hidden = linear.reference(x if form.norm is None else norm_reference(x, form.norm), form.inner)
    first, *up = hidden[0].chunk(2, -1) if form.fused else hidden
    a = form.act.reference(first)
    y = linear.reference(a * up[0] if up else a, [form.down])[0]
    return x + y if form.residual else y


def mlp(x: Tensor, form: Form) -> Tensor:
    """An MLP of any form, [docs/math.md (79)]: x (..., d) -> (..., d). Gradients go to x and to the factors A and B.

    Raises:
        ValueError: A weight of the base asks for a gradient, a dropout leaves nothing, or what is fused has no halves.
    """
    modules = (*form.inner, form.down)
    for name, share in (("output", form.dropout), ("inner numbers", form.within)):
        if not 0 <= share < 1:
            raise ValueError(f"the dropout of an MLP's {name} is at least 0 and below 1; it is {share}")
    if form.fused and len(form.inner) != 1:
        raise ValueError(f"gate and up are fused in one module, and there are {len(form.inner)}")
    if torch.is_grad_enabled():
        refuse_trained(modules)
        refuse_trained_norm(form.norm)
    if casts(x):
        return _under_autocast(x, form)
    flat = factors(modules)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat)):
        y = _Mlp.apply(x, form, *flat)
    else:
        with as_written(x):
            y = _forward(x, form)[0]
    return unflat(y, x)  # here: an output that is a view could not be changed in place


def _under_autocast(x: Tensor, form: Form) -> Tensor:
    """As autocast has it: the norm and the residual in the dtype of x, what is between them in autocast's."""
    n = x if form.norm is None else normalised(x, form.norm)
    n = autocast(n)
    with as_written(x):
        y = mlp(n, form._replace(norm=None, residual=False))
    return x + y if form.residual else y


class _Made(NamedTuple):
    """What a forward made that a backward may want."""

    stats: Sequence[Tensor]  # of the norm
    hidden: list[Tensor]  # what gate and up gave, (N, f)
    record: Tensor | None  # of the dropout
    within: Tensor | None  # of the one before down
    groups: tuple[Group, Group]


def _forward(x: Tensor, form: Form) -> tuple[Tensor, _Made]:
    """The output rows (N, d), and what was made on the way."""
    flat = rows(x)
    n, stats = (flat, ()) if form.norm is None else form.norm.forward(flat)
    inner, outer = Group.of(form.inner, n), Group.of([form.down], n)
    hidden = inner.forward(n)
    del n
    hidden = _halves(hidden, form)
    a = activate(form.act, hidden[0], hidden[1] if len(hidden) == 2 else None, torch.empty_like(hidden[0]))
    a, within = join(a, None, form.within)
    y, record = join(outer.forward(a)[0], flat if form.residual else None, form.dropout)
    return y, _Made(stats, hidden, record, within, (inner, outer))


def _halves(hidden: list[Tensor], form: Form) -> list[Tensor]:
    """What gate and up gave, (N, f) each, of what the inner modules gave."""
    return [half.contiguous() for half in hidden[0].chunk(2, 1)] if form.fused else hidden


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form, *flat: Tensor | None) -> Tensor:
        y, made = _forward(x, form)
        inner, outer = made.groups
        # where neither x nor gate or up is trained, nothing goes back through the activation
        ctx.deep = ctx.needs_input_grad[0] or any(A or B for A, B in inner.trains)
        hidden = ctx.deep or outer.needs_x  # whether what gate and up gave is wanted
        ctx.again = hidden and not form.keep
        wants_x = ctx.again or inner.needs_x or (form.norm is not None and ctx.needs_input_grad[0])
        (ctx.inner, inside), (ctx.outer, outside) = inner.pack(), outer.pack()
        parts = [
            outside,
            made.hidden if hidden and form.keep else (),
            made.stats if wants_x else (),
            [x if wants_x else None, made.record, made.within],
            inside if ctx.deep or ctx.again else (),
        ]
        ctx.form, ctx.shape, ctx.counts = form, x.shape, [len(part) for part in parts]
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        tensors, form = iter(ctx.saved_tensors), ctx.form
        outside, hidden, stats, (x, record, within), inside = (
            [next(tensors) for _ in range(count)] for count in ctx.counts
        )
        with as_written(dy):
            dy = rows(dy)
            outer, dlast = Group.unpack(ctx.outer, outside), join_backward(dy, record, form.dropout)
            n, flat, norm = None, None if x is None else rows(x), form.norm
            if ctx.again:
                n = _read(flat, stats, norm)
                hidden = _halves(Group.unpack(ctx.inner, inside).again(n, [m.bias for m in form.inner]), form)
            dhidden, last = _back_through_the_activation(dlast, (hidden, within), outer, form, ctx.deep)
            del hidden
            if not ctx.deep:
                return (None, None, *(None for _ in form.inner for _ in range(2)), *last)
            inner = Group.unpack(ctx.inner, inside)
            n = _read(flat, stats, norm) if n is None and inner.needs_x else n
            dx, grads = inner.backward(n, dhidden, ctx.needs_input_grad[0], owned=norm is not None and inner.needs_x)
            del n, dhidden, dlast
            if dx is not None:
                add = dy if form.residual else None
                dx = back_through(norm, dx, flat, stats, add).view(ctx.shape)
        return (dx, None, *(grad for pair in grads for grad in pair), *last)


def _read(flat: Any, stats: Sequence[Tensor], norm: Norm | None) -> Tensor:
    """What gate and up read of x (N, d), once more."""
    n: Tensor = flat if norm is None else norm.again(flat, stats)
    return n


def _back_through_the_activation(
    dy: Tensor, saved: tuple[Sequence[Tensor], Tensor | None], outer: Group, form: Form, deep: bool
) -> tuple[list[Tensor], tuple[Tensor | None, Tensor | None]]:
    """The gradients of what the inner modules gave, where they are wanted, and those of down's A and B.

    saved: what gate and up gave, (N, f) each, and the record of the dropout before down.
    """
    hidden, within = saved
    first, up = (hidden[0] if hidden else None), (hidden[1] if len(hidden) == 2 else None)
    a = None if first is None or not outer.needs_x else activate(form.act, first, up, torch.empty_like(first))
    a = None if a is None else join_backward(a, within, form.within)  # which drops the same again
    da, ((grad_a, grad_b),) = outer.backward(a, [dy], need_dx=deep, owned=True)
    del a
    if da is None or first is None:
        return [], (grad_a, grad_b)
    both = activate_backward(form.act, join_backward(da, within, form.within), first, up)
    return [torch.cat(both, 1)] if form.fused else both, (grad_a, grad_b)
