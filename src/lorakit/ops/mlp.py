"""Fused MLP sublayer as one autograd function: norm, gate and up projections, activation, down projection, residual.

Saved are x and its norm statistics, the gate and up outputs (unless they are recomputed), one (tokens, r) activation
per adapter, and dropout records. The rest is recomputed in buffers that are then reused for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops import linear, reference
from lorakit.ops.activation import Activation, activate, activate_backward
from lorakit.ops.adapted import Adapted, aliased, check_frozen, factors
from lorakit.ops.autograd import (
    Context,
    Replayed,
    autocast,
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
from lorakit.ops.norm import Norm, check_frozen_norm, norm_backward, norm_recompute, normalize


class Form(NamedTuple):
    """Modules and options of an MLP sublayer.

    Attributes:
        inner: The projections before the activation: gate and up, or only up, or one fused module (2·f, d) for both.
        down: The down projection.
        act: Activation applied to the gate output, or to the up output if there is no gate.
        norm: Norm applied to the input, or None.
        residual: Whether x is added to the output.
        dropout: Dropout probability for the output of the down projection, before the residual is added.
        within: Dropout probability for the input of the down projection.
        fused: Whether a single module computes gate and up.
        keep: Whether the gate and up outputs are saved for the backward pass, not recomputed. [docs/math.md (85)]
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


def mlp(x: Tensor, form: Form) -> Tensor:
    """Compute an MLP sublayer of any form, (..., d) -> (..., d), with gradients of x, A and B. [docs/math.md (79)]

    With a gate, it is down(act(gate(n))·up(n)) with n = norm(x), otherwise down(act(up(n))).

    Source: Shazeer 2020, arXiv:2002.05202, eq. (6).

    Raises:
        ValueError: A dropout probability is not in [0, 1), `fused` has several inner modules, or a weight is trained.
    """
    modules = (*form.inner, form.down)
    for name, share in (("output", form.dropout), ("inner activation", form.within)):
        if not 0 <= share < 1:
            raise ValueError(f"MLP {name} dropout must be in [0, 1); got {share}")
    if form.fused and len(form.inner) != 1:
        raise ValueError(f"a fused MLP needs one gate-and-up module; got {len(form.inner)}")
    if torch.is_grad_enabled():
        check_frozen(modules)
        check_frozen_norm(form.norm)
    if is_cast_by_autocast(x):
        return _under_autocast(x, form)
    flat = factors(modules)
    if needs_gradient(x, *flat):
        edge = None if _needs_x(form, x.requires_grad) else edge_of(x)
        y = _Mlp.apply(x, form, edge, *flat)
    else:
        with without_autocast(x):
            y = _forward(x, form)[0]
    # reshaped outside the autograd function, because its outputs must not be views if callers modify them in place
    return unflat(y, x)


def _under_autocast(x: Tensor, form: Form) -> Tensor:
    """Run the sublayer in the autocast dtype, except for the norm and the residual, which use the dtype of x."""
    n = autocast(x if form.norm is None else normalize(x, form.norm))
    with without_autocast(x):
        y = mlp(n, form._replace(norm=None, residual=False))
    return x + y if form.residual else y


class _Intermediates(NamedTuple):
    """Intermediate results of a forward pass that its backward pass may need."""

    stats: Sequence[Tensor]  # row statistics of the norm
    hidden: list[Tensor]  # gate and up outputs, (N, f)
    record: Tensor | None  # dropout record for the output
    within: Tensor | None  # dropout record for the input of the down projection
    groups: tuple[Group, Group]


def _forward(x: Tensor, form: Form) -> tuple[Tensor, _Intermediates]:
    """Return the output rows (N, d) and the intermediate results."""
    flat = rows(x)
    n, stats = (flat, ()) if form.norm is None else form.norm.forward(flat)
    inner, outer = Group.of(form.inner, n), Group.of([form.down], n)
    hidden = inner.forward(n)
    del n
    hidden = _halves(hidden, form)
    a = activate(form.act, hidden[0], hidden[1] if len(hidden) == 2 else None, torch.empty_like(hidden[0]))
    a, within = dropout_add(a, None, form.within)
    y, record = dropout_add(outer.forward(a)[0], flat if form.residual else None, form.dropout)
    return y, _Intermediates(stats, hidden, record, within, (inner, outer))


def _halves(hidden: list[Tensor], form: Form) -> list[Tensor]:
    """Return the gate and up outputs (N, f), splitting the output of a fused module."""
    return [half.contiguous() for half in hidden[0].chunk(2, 1)] if form.fused else hidden


_State = tuple[Form, torch.Size, list[int], linear.Form, linear.Form]
"""The form, the shape of x, the number of saved tensors in each part, and the packed inner and outer groups."""


def _needs_x(form: Form, needs_dx: bool) -> bool:
    """Return whether the backward pass needs x, also if the gate and up outputs are saved."""
    trains_a = any(one.low is not None and one.low.A.requires_grad for one in form.inner)
    return trains_a or (needs_dx and (form.norm is not None or not form.keep))


def _replay(ctx: Context[_State], saved: Sequence[Tensor]) -> Replayed:
    tensors, (form, shape, counts, inner_form, outer_form) = iter(saved), ctx.state
    outside, hidden, _, (x, edge, record, within), inside = ([next(tensors) for _ in range(n)] for n in counts)
    flat, dtype = entered(x, edge, shape, (inner_form.dtype, form.down.W.device)), inner_form.dtype
    sites, factors_of_sites = aliased((*form.inner, form.down))
    count = shape[:-1].numel()
    drawn = reference.DrawnMlp(
        linear.Group.unpack(inner_form, inside).drawn(count) if inside else reference.Drawn(),
        linear.Group.unpack(outer_form, outside).drawn(count),
        hidden if x is None else None,
        None if record is None else kept_elements(record, (count, form.down.out_features), form.dropout, dtype),
        None if within is None else kept_elements(within, (count, form.down.in_features), form.within, dtype),
    )
    y = reference.mlp(flat.flatten(0, -2), form._replace(inner=tuple(sites[:-1]), down=sites[-1]), drawn)
    return (flat, None, None, *factors_of_sites), (y,)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_State], x: Tensor, form: Form, edge: Tensor | None, *flat: Tensor | None) -> Tensor:
        y, results = _forward(x, form)
        inner, outer = results.groups
        (inner_form, inside), (outer_form, outside) = inner.pack(), outer.pack()
        # if neither x nor any LoRA factor of gate or up needs a gradient, no gradient flows through the activation
        deep = ctx.needs_input_grad[0] or inner_form.is_trained
        hidden = deep or outer.needs_x  # whether the gate and up outputs are needed
        recompute = hidden and not form.keep
        wants_x = recompute or _needs_x(form, ctx.needs_input_grad[0])
        parts = [
            outside,
            results.hidden if hidden and form.keep else (),
            results.stats if wants_x else (),
            [x if wants_x else None, edge, results.record, results.within],
            inside if deep or recompute else (),
        ]
        ctx.state = form, x.shape, [len(part) for part in parts], inner_form, outer_form
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))
        return y

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[_State], dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors, (form, shape, counts, inner_form, outer_form) = iter(ctx.saved_tensors), ctx.state
        outside, hidden, stats, (x, _, record, within), inside = ([next(tensors) for _ in range(n)] for n in counts)
        deep, norm = ctx.needs_input_grad[0] or inner_form.is_trained, form.norm
        with without_autocast(dy):
            dy = rows(dy)
            outer, dlast = Group.unpack(outer_form, outside), dropout_add_backward(dy, record, form.dropout)
            n, flat = None, None if x is None else rows(x)
            if (deep or outer.needs_x) and not form.keep:
                n = norm_recompute(norm, flat, stats)
                hidden = _halves(Group.unpack(inner_form, inside).recompute(n), form)
            dhidden, last = _back_through_the_activation(dlast, (hidden, within), outer, form, deep)
            del hidden
            if not deep:
                return (None, None, None, *(None for _ in form.inner for _ in range(2)), *last)
            inner = Group.unpack(inner_form, inside)
            n = norm_recompute(norm, flat, stats) if n is None and inner.needs_x else n
            dx, grads = inner.backward(n, dhidden, ctx.needs_input_grad[0], owned=norm is not None and inner.needs_x)
            del n, dhidden, dlast
            if dx is not None:
                add = dy if form.residual else None
                dx = norm_backward(norm, dx, flat, stats, add).view(shape)
        return (dx, None, None, *(grad for pair in grads for grad in pair), *last)


def _back_through_the_activation(
    dy: Tensor, saved: tuple[Sequence[Tensor], Tensor | None], outer: Group, form: Form, deep: bool
) -> tuple[list[Tensor], tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of the inner modules' outputs, if needed, and of the down projection's A and B."""
    hidden, within = saved
    first, up = (hidden[0] if hidden else None), (hidden[1] if len(hidden) == 2 else None)
    a = None if first is None or not outer.needs_x else activate(form.act, first, up, torch.empty_like(first))
    a = None if a is None else dropout_add_backward(a, within, form.within)  # applies the same dropout mask
    da, ((grad_a, grad_b),) = outer.backward(a, [dy], need_dx=deep, owned=True)
    del a
    if da is None or first is None:
        return [], (grad_a, grad_b)
    both = activate_backward(form.act, dropout_add_backward(da, within, form.within), first, up)
    return [torch.cat(both, 1)] if form.fused else both, (grad_a, grad_b)
