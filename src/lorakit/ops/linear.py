"""A single autograd function for several frozen linear modules that share an input, each with or without LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.adapted import Adapted, LowRank, aliased, check_frozen, factors
from lorakit.ops.autograd import (
    Context,
    Replayed,
    autocast,
    edge_of,
    entered,
    needs_gradient,
    rows,
    unflat,
    with_replay,
    without_autocast,
)
from lorakit.ops.choices import matmul, matmul_dtype
from lorakit.ops.dropout import apply_dropout, draw, kept_elements, zero_
from lorakit.ops.int8 import Int8Inputs, input_gradient, output
from lorakit.ops.int8_weight import Int8Weight
from lorakit.ops.kernels import kernels_for

if TYPE_CHECKING:
    from lorakit.ops.kernels.triton.launching import TritonKernels


def linears(x: Tensor, group: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """Return the outputs (…, out) of adapted linear modules that share the input x (…, in). [docs/math.md (71)]

    Gradients flow to x and to each A and B, in the dtype of each. Matmuls run in the dtype of x, or in the autocast
    dtype. Saved are x, one (tokens, r) activation per adapter, and dropout records. All W and biases must be frozen.
    """
    if torch.is_grad_enabled():
        check_frozen(group)
    x, flat = autocast(x), factors(group)
    if needs_gradient(x, *flat):
        trained = [t is not None and t.requires_grad for t in flat]
        # without gradients of A, x is not saved, but that of B depends on x
        edge = edge_of(x) if any(trained) and not any(trained[::2]) else None
        ys = _Linears.apply(x, tuple(group), edge, *flat)
    else:
        with without_autocast(x):
            ys = Group.of(group, x).forward(rows(x))
    # reshaped outside the autograd function, because its outputs must not be views if callers modify them in place
    return tuple(unflat(y, x) for y in ys)


def few_rows(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return x·Wᵀ + b (…, out) for x (…, in), rounded once, without autograd, or None if a kernel is not available.

    PyTorch chooses the order of additions by the number of rows. Here, a row of the result has the same bits for any
    number of rows up to the kernel's limit, any other rows and any order. W is (out, in), rows at a distance; b (out,).
    """
    kernels = kernels_for(W, bias, strided=True)
    linear = None if kernels is None else kernels.linear
    if linear is None or W.dim() != 2 or W.stride(1) != 1 or W.shape[1] != x.shape[-1]:
        return None
    if not 0 < x.numel() <= linear.linear_rows[W.dtype] * W.shape[1]:
        return None
    x = x.contiguous()
    return linear.linear_few_rows(x, W, bias) if x.dtype == W.dtype and kernels_for(x) is not None else None


class Form(NamedTuple):
    """The non-tensor state of a `Group`, as returned by `Group.pack`."""

    dtype: torch.dtype
    inside: torch.dtype
    sites: tuple[Adapted, ...]
    trains: tuple[tuple[bool, bool], ...]  # whether A and B require gradients

    @property
    def is_trained(self) -> bool:
        """Return whether any A or B requires a gradient."""
        return any(A or B for A, B in self.trains)


class LowRankMatmuls(NamedTuple):
    """Results of matmuls with the gradient dy (N, out) of an output; each is None if its other operand was None.

    `dh` is dy·B (N, r), the gradient of the low-rank activation, in the dtype of dy; `kept` is dy·W_K (N, k) in fp32;
    `grad_b` is dyᵀ·h (out, r), in fp32 if a kernel computed it, otherwise in the dtype of dy.
    """

    dh: Tensor | None
    kept: Tensor | None
    grad_b: Tensor | None


def low_rank_matmuls(dy: Tensor, B: Tensor | None, columns: Tensor | None, h: Tensor | None) -> LowRankMatmuls:
    """Return the matmuls of dy (N, out), read once by a kernel, with B (out, r), columns W_K (out, k) and h (N, r)."""
    if B is None and columns is None and h is None:
        return LowRankMatmuls(None, None, None)
    kernels = kernels_for(dy, B, columns)
    fused = None if kernels is None else kernels.low_rank
    if fused is not None and fused.supports(dy, h, max(each.shape[1] for each in (B, columns, h) if each is not None)):
        return LowRankMatmuls(*fused.low_rank_gradients(dy, B, columns, h))
    return LowRankMatmuls(
        None if B is None else torch.mm(dy, B),
        None if columns is None else torch.mm(dy, columns).float(),
        None if h is None else torch.mm(h.t(), dy).t(),  # faster than dyᵀ·h for small r
    )


class Group:
    """Forward and backward computations of linear modules that share an input, without autograd.

    An autograd function's forward calls `forward`, then `pack` for what must be saved in addition to x; its backward
    calls `unpack`, then `backward`. Gradients must not be recorded. `owned=True` permits a method to overwrite x. If
    matmuls run in a wider dtype, each input is upcast once for all of its matmuls, and each result is rounded once.
    """

    def __init__(self, group: Sequence[Adapted], dtype: torch.dtype, inside: torch.dtype | None = None) -> None:
        self.sites = tuple(group)
        self.dtype = dtype
        self.inside = inside = inside or dtype
        self.h: list[Tensor | None] = [None] * len(self.sites)
        self.records: list[Tensor | None] = [None] * len(self.sites)
        self.low = {j: site.low for j, site in enumerate(self.sites) if site.low is not None}
        self.trains = tuple((m.low.A.requires_grad, m.low.B.requires_grad) if m.low else (False, False) for m in group)
        self.plain = [j for j, low in self.low.items() if low.p == 0]
        self.dropping = [j for j, low in self.low.items() if low.p > 0]
        self.B = {j: low.B.to(inside) for j, low in self.low.items()}
        # A, the smallest operand, absorbs the scale and the division by 1 − p. As a result, h is already scaled, and
        # neither s·B·(A·x) nor the gradient of B needs another multiplication.
        self.A = {j: _scaled(low).to(inside) for j, low in self.low.items() if low.p > 0}
        self.stacked = torch.cat([_scaled(self.low[j]) for j in self.plain]).to(inside) if self.plain else None

    @classmethod
    def of(cls, group: Sequence[Adapted], x: Tensor) -> Group:
        """Create the group for an input x (…, in), using the matmul dtype that autotuning chose for x's row count."""
        dense = [site.W for site in group if isinstance(site.W, Tensor)]
        if len(dense) < len(group):
            return cls(group, x.dtype)
        return cls(group, x.dtype, matmul_dtype(x.numel() // x.shape[-1], dense, x.dtype))

    @property
    def needs_x(self) -> bool:
        """Return whether the backward pass needs x. Only the gradients of A depend on x."""
        return any(A for A, _ in self.trains)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs (N, out) for x (N, in)."""
        x = x.to(self.inside)
        for j in self.dropping:
            self.records[j] = draw(x, self.low[j].p)
        hs = self._low_rank(x, range(len(self.sites)))
        self.h = [hs.get(j) if trains else None for j, (_, trains) in enumerate(self.trains)]
        return self._outputs(x, hs)

    def recompute(self, x: Tensor) -> list[Tensor]:
        """Recompute the outputs of `forward` bit for bit from x (N, in) and the saved state."""
        x = x.to(self.inside)
        hs = {j: h for j, h in enumerate(self.h) if h is not None}
        return self._outputs(x, hs | self._low_rank(x, [j for j in self.low if j not in hs]))

    def _outputs(self, x: Tensor, hs: dict[int, Tensor]) -> list[Tensor]:
        """Return the outputs (N, out) of all sites; `hs` has the scaled low-rank activations."""
        inputs = Int8Inputs(x)
        return [self._output(inputs, site, hs.get(j), self.B.get(j)) for j, site in enumerate(self.sites)]

    def _output(self, inputs: Int8Inputs, site: Adapted, h: Tensor | None, B: Tensor | None) -> Tensor:
        """Return x·Wᵀ + b, plus h·Bᵀ if there is an adapter, added by the large matmul; h includes the scale."""
        if isinstance(site.W, Int8Weight):
            return output(inputs, site.W, site.bias, h, B)
        x = inputs.x
        W, plus, out = site.W.to(self.dtype), None if site.bias is None else site.bias.to(x.dtype), None
        if h is not None and B is not None:
            plus = out = torch.mm(h, B.t()) if plus is None else torch.addmm(plus, h, B.t())
        return matmul(x, W if site.transposed else W.t(), out, plus).to(self.dtype)

    def _low_rank(self, x: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Return the scaled low-rank activation (N, r) of each module in `wanted` that has an adapter."""
        hs: dict[int, Tensor] = {}
        if self.stacked is not None and any(j in wanted for j in self.plain):
            ranks = [len(self.low[j].A) for j in self.plain]
            hs.update(zip(self.plain, torch.mm(x, self.stacked.t()).split(ranks, 1), strict=True))
        dropping = [j for j in self.dropping if j in wanted]
        fused = self._fused(x) if dropping else None
        if fused is not None:
            hs.update({j: fused.shrink(x, self.A[j], self.low[j].p, self._record(j)) for j in dropping})
        for j, kept in self._inputs(x, dropping if fused is None else (), False, []):
            hs[j] = torch.mm(kept, self.A[j].t())
        return hs

    def backward(
        self, x: Tensor | None, dys: Sequence[Tensor | None], need_dx: bool = True, owned: bool = False
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
        """Return the gradient of x (N, in) if `need_dx`, and those of each A and B, given `dys` (N, out) or None each.
        x may be None if `needs_x` is false. If `owned` is true, the gradient of x may reuse its storage.
        """
        if self.inside != self.dtype:
            x, owned = None if x is None else x.to(self.inside), True
        live = {j: dy.to(self.inside) for j, dy in enumerate(dys) if dy is not None}
        matmuls = {j: self._low_rank_matmuls(j, dy, need_dx) for j, dy in live.items()}
        dh = {j: each.dh for j, each in matmuls.items() if each.dh is not None}
        stacked_dh = self._stacked_grads(dh)
        spare: list[Tensor] = []  # reusable buffers, shaped like x: allocating one takes as long as a low-rank matmul
        grads_a = {} if x is None else self._grads_a(x, dh, stacked_dh, owned, spare)
        spare += [x] if owned and x is not None else []
        kept = [each.kept for each in matmuls.values() if each.kept is not None]
        dx = self._grad_x(live, dh, stacked_dh, kept, spare) if need_dx else None
        dx = None if dx is None else dx.to(self.dtype)
        return dx, [(grads_a.get(j), self._grad_b(j, matmuls.get(j))) for j in range(len(dys))]

    def pack(self) -> tuple[Form, list[Tensor | None]]:
        """Return what the backward pass needs in addition to x: non-tensor state, and tensors to save. Those of the
        modules are saved too, so that autograd notices if they are modified in place.
        """
        weights = [site.W for site in self.sites if isinstance(site.W, Tensor)]
        tensors = [*self.h, *self.records, *weights, *factors(self.sites)]
        return Form(self.dtype, self.inside, self.sites, self.trains), tensors

    @classmethod
    def unpack(cls, form: Form, tensors: Sequence[Tensor]) -> Group:
        """Recreate a group, in its state after the forward pass, from the results of `pack`."""
        group, count = cls(form.sites, form.dtype, form.inside), len(form.sites)
        group.trains, group.h, group.records = form.trains, list(tensors[:count]), list(tensors[count : 2 * count])
        return group

    def drawn(self, count: int) -> reference.Drawn:
        """Return the dropout masks and the low-rank activations of the forward pass of `count` rows, for a replay."""
        masks: list[Tensor | None] = [None] * len(self.sites)
        for j in self.dropping:
            shape = count, self.low[j].A.shape[1]
            masks[j] = kept_elements(self._record(j), shape, self.low[j].p, self.inside)
        return reference.Drawn(masks, self.h)

    def _stacked_grads(self, dh: dict[int, Tensor]) -> Tensor | None:
        """Concatenate the gradients dh (N, r) of all modules without dropout, in the order of the stacked A factors."""
        first = next((dh[j] for j in self.plain if j in dh), None)
        if first is None:
            return None
        parts = [dh[j] if j in dh else first.new_zeros(len(first), len(self.low[j].A)) for j in self.plain]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _low_rank_matmuls(self, j: int, dy: Tensor, need_dx: bool) -> LowRankMatmuls:
        """Return the low-rank matmuls with the gradient dy (N, out) of output j that the backward pass needs."""
        W = self.sites[j].W
        B = self.B.get(j) if need_dx or self.trains[j][0] else None
        columns = W.columns.to(dy.dtype) if need_dx and isinstance(W, Int8Weight) else None
        return low_rank_matmuls(dy, B, columns, self.h[j])

    def _grad_x(
        self,
        dys: dict[int, Tensor],
        dh: dict[int, Tensor],
        stacked_dh: Tensor | None,
        kept: Sequence[Tensor],
        spare: list[Tensor],
    ) -> Tensor | None:
        total: Tensor | None = None
        part: Tensor | None = None
        dropping = [j for j in self.dropping if j in dh]
        fused = self._fused(dh[dropping[0]]) if dropping else None
        # Adapters with dropout come first, because dropped elements must be zeroed before anything else is added.
        for j in dropping if fused is None else ():
            room = part if part is not None else _taken(spare)
            dropped = zero_(torch.mm(dh[j], self.A[j], out=room), self._record(j), self.low[j].p)
            total, part = (dropped, None) if total is None else (total.add_(dropped), dropped)
        if stacked_dh is not None and self.stacked is not None:
            total = matmul(stacked_dh, self.stacked, _taken(spare) if total is None else total, total)
        int8: list[tuple[Tensor, Int8Weight]] = []
        for j, dy in dys.items():
            W = self.sites[j].W
            if isinstance(W, Int8Weight):
                int8.append((dy, W))
                continue
            W = (W.t() if self.sites[j].transposed else W).to(self.dtype)
            total = matmul(dy, W, _taken(spare) if total is None else total, total)
        total = input_gradient(int8, total, kept) if int8 else total
        if fused is not None and total is not None:
            for j in dropping:
                fused.add_low_rank(dh[j], self.A[j], self.low[j].p, self._record(j), total)
        return total

    def _grads_a(
        self, x: Tensor, dh: dict[int, Tensor], stacked_dh: Tensor | None, owned: bool, spare: list[Tensor]
    ) -> dict[int, Tensor]:
        """Return s·dhᵀ·(D∘x) by module index, for each A that is trained; D is the dropout mask divided by 1 − p."""
        grads: dict[int, Tensor] = {}
        if stacked_dh is not None and any(self.trains[j][0] for j in self.plain):
            ranks = [len(self.low[j].A) for j in self.plain]
            grads.update(zip(self.plain, torch.mm(stacked_dh.t(), x).split(ranks), strict=True))
        dropping = [j for j in self.dropping if j in dh and self.trains[j][0]]
        fused = self._fused(x)
        if fused is not None:
            grads.update({j: fused.outer(dh[j], x, self.low[j].p, self._record(j)) for j in dropping})
        for j, kept in self._inputs(x, dropping if fused is None else (), owned, spare):
            grads[j] = torch.mm(dh[j].t(), kept)
        wanted = [j for j in grads if j in dh and self.trains[j][0]]
        return {j: grads[j].to(self.low[j].A.dtype).mul_(_scale(self.low[j])) for j in wanted}

    def _inputs(
        self, x: Tensor, dropping: Sequence[int], owned: bool, spare: list[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the input after dropout of each module in `dropping`. The inputs share one buffer, which
        remains in `spare`. If `owned` is true, the last input overwrites x instead.
        """
        for j in dropping:
            if owned and j == dropping[-1]:
                yield j, zero_(x, self._record(j), self.low[j].p)
                return
            if not spare:
                spare.append(torch.empty_like(x))
            yield j, apply_dropout(x, self._record(j), self.low[j].p, out=spare[0])

    def _fused(self, like: Tensor) -> TritonKernels | None:
        """Return the kernels that fuse dropout with low-rank matmuls, or None if there are none for `like` (N, n)."""
        wide = [self.A[j] for j in self.dropping]
        kernels = kernels_for(like, *wide) if wide and wide[0].shape[1] % 4 == 0 else None
        seeds = all(self._record(j).dtype == torch.uint64 for j in self.dropping)
        return kernels.dropping if kernels is not None and seeds else None

    def _record(self, j: int) -> Tensor:
        record = self.records[j]
        assert record is not None  # drawn in the forward pass
        return record

    def _grad_b(self, j: int, matmuls: LowRankMatmuls | None) -> Tensor | None:
        """Return the gradient of B in the dtype of B and contiguous."""
        if matmuls is None or matmuls.grad_b is None:
            return None
        grad, B = matmuls.grad_b, self.low[j].B
        if grad.dtype == B.dtype and grad.is_contiguous():
            return grad
        return torch.empty(B.shape, dtype=B.dtype, device=B.device).copy_(grad)


_State = tuple[Form, torch.Size]
"""The packed group, and the shape of x."""


def _replay(ctx: Context[_State], saved: Sequence[Tensor]) -> Replayed:
    (x, edge, *tensors), (form, shape) = saved, ctx.state
    flat = entered(x, edge, shape, (form.dtype, form.sites[0].W.device))
    sites, inputs = aliased(form.sites)
    ys = reference.linear(rows(flat), sites, *Group.unpack(form, tensors).drawn(shape[:-1].numel()))
    return (flat, None, None, *inputs), ys


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_State], x: Tensor, group: tuple[Adapted, ...], edge: Tensor | None, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        parts = Group.of(group, x)
        with without_autocast(x):
            ys = parts.forward(rows(x))
        form, tensors = parts.pack()
        ctx.state = form, x.shape
        ctx.save_for_backward(x if parts.needs_x else None, edge, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[_State], *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, _, *tensors), (form, shape) = ctx.saved_tensors, ctx.state
        flat = [None if dy is None else rows(dy) for dy in dys]
        with without_autocast(next(t for t in (*dys, *tensors) if t is not None)):
            parts = Group.unpack(form, tensors)
            dx, grads = parts.backward(None if x is None else rows(x), flat, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(shape), None, None, *(grad for pair in grads for grad in pair)


def _taken(spare: list[Tensor]) -> Tensor | None:
    return spare.pop() if spare else None


def _scale(low: LowRank) -> float:
    return low.scale / (1 - low.p)


def _scaled(low: LowRank) -> Tensor:
    """Return A (r, in) times s / (1 − p), in the dtype of A."""
    return low.A * _scale(low)
