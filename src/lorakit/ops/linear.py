"""LoRA beside frozen linear modules that share one input: all their products as one function of autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakit.ops.adapted import Adapted, LowRank, as_written, autocast, factors, refuse_trained, rows, unflat
from lorakit.ops.choices import dtype_of_products, product
from lorakit.ops.dropout import draw, without, zero_
from lorakit.ops.kernels.choosing import kernels_for
from lorakit.ops.kernels.protocol import DroppingProducts

__all__ = ["Adapted", "Form", "Group", "LowRank", "factors", "linears", "reference", "refuse_trained", "rows", "unflat"]


def reference(x: Tensor, group: Sequence[Adapted], masks: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """What `linears` computes of x (…, in), in plain PyTorch; `masks` has what each module's dropout keeps (…, in)."""
    outputs = []
    for module, mask in zip(group, masks or [None] * len(group), strict=True):
        y = F.linear(x, module.W.t() if module.transposed else module.W, module.bias)
        if module.low is not None:
            low = module.low
            kept = x if mask is None else x * mask.to(x.dtype) / (1 - low.p)
            y = y + low.scale * F.linear(F.linear(kept, low.A.to(x.dtype)), low.B.to(x.dtype))
        outputs.append(y)
    return outputs


def linears(x: Tensor, group: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """The outputs (…, out) of modules that share the input x (…, in), each with its adapter's part [docs/math.md (71)].

    Gradients go to x and to each A and B, in their dtypes; products run in the dtype of x, or autocast's.
    Saved for the backward: x, (tokens, r) for each adapter, and what its dropout dropped.

    Raises:
        ValueError: A frozen weight or bias asks for a gradient.
    """
    if torch.is_grad_enabled():
        refuse_trained(group)
    x, flat = autocast(x), factors(group)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat)):
        ys = _Linears.apply(x, tuple(group), *flat)
    else:
        with as_written(x):
            ys = Group.of(group, x).forward(rows(x))
    return tuple(unflat(y, x) for y in ys)  # here: outputs that are views could not be changed in place


class Form(NamedTuple):
    """What of a packed group is no tensor."""

    dtype: torch.dtype
    inside: torch.dtype
    sites: tuple[tuple[bool, float | None, float], ...]  # transposed; scale (None: no adapter), dropout
    trains: tuple[tuple[bool, bool], ...]  # whether A, B ask for a gradient


class Group:
    """The products of modules that share one input, as a forward and a backward without autograd.

    For functions of autograd: `forward`, then `pack` for what must be saved besides x; `unpack` in their backward, then
    `backward`. To be called where no gradient is recorded. A tensor that is called owned may be overwritten.

    What comes in and goes out has one dtype, what is multiplied inside may have a wider one: then each input is widened
    once for all its products, and each result rounded once.
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
        # the scale, and what dropout divides by, go into A, the smallest operand: s·h comes out, and s·B·(A·x) and the
        # gradient of B need no more
        self.A = {j: _scaled(low).to(inside) for j, low in self.low.items() if low.p > 0}
        self.stacked = torch.cat([_scaled(self.low[j]) for j in self.plain]).to(inside) if self.plain else None

    @classmethod
    def of(cls, group: Sequence[Adapted], x: Tensor) -> Group:
        """The group for an input x (…, in), multiplied in the dtype that was chosen for as many rows."""
        inside = dtype_of_products(x.numel() // x.shape[-1], [site.W for site in group], x.dtype)
        return cls(group, x.dtype, inside)

    @property
    def needs_x(self) -> bool:
        """Whether the backward asks for x: only the gradient of an A does."""
        return any(A for A, _ in self.trains)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs (N, out) for x (N, in)."""
        x = x.to(self.inside)
        for j in self.dropping:
            self.records[j] = draw(x, self.low[j].p)
        hs = self._thin(x, range(len(self.sites)))
        self.h = [hs.get(j) if trains else None for j, (_, trains) in enumerate(self.trains)]
        return [self._output(x, site, hs.get(j), self.B.get(j)) for j, site in enumerate(self.sites)]

    def again(self, x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        """What `forward` gave for x (N, in), to the bit, from what it left and the modules' biases (out,)."""
        x = x.to(self.inside)
        hs = {j: h for j, h in enumerate(self.h) if h is not None}
        hs |= self._thin(x, [j for j in self.low if j not in hs])
        sites = [replace(site, bias=bias) for site, bias in zip(self.sites, biases, strict=True)]
        return [self._output(x, site, hs.get(j), self.B.get(j)) for j, site in enumerate(sites)]

    def _output(self, x: Tensor, site: Adapted, h: Tensor | None, B: Tensor | None) -> Tensor:
        """x·Wᵀ + b, plus s·h·Bᵀ where there is an adapter.

        The thin product comes first, and the large one adds to it; the other way round takes as long.
        """
        W, y = site.W.to(self.dtype), None if site.bias is None else site.bias.to(x.dtype)
        if h is not None and B is not None:
            y = torch.mm(h, B.t()) if y is None else torch.addmm(y, h, B.t())
            y = product(x, W if site.transposed else W.t(), y, y)
        else:
            y = product(x, W if site.transposed else W.t(), plus=y)
        return y.to(self.dtype)

    def _thin(self, x: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
        """s·h (N, r) of the modules that are wanted and have an adapter."""
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
        """The gradients of x (N, in), where asked for, and of each (A, B), from those of the outputs (N, out).

        x may be None where `needs_x` is false; the result may lie where an owned x was. An output that has no gradient
        is None.
        """
        if self.inside != self.dtype:
            x, owned = None if x is None else x.to(self.inside), True
        live = {j: dy.to(self.inside) for j, dy in enumerate(dys) if dy is not None}
        dh = {j: torch.mm(live[j], self.B[j]) for j in self.low if j in live and (need_dx or self.trains[j][0])}
        dropping = [j for j in self.dropping if j in dh]
        beside = self._beside(dh)
        spare: list[Tensor] = []  # room of the shape of x: fresh pages cost as much as a thin product
        grads_a = {} if x is None else self._grads_a(x, dh, beside, owned, spare)
        spare += [x] if owned and x is not None else []
        dx = self._grad_x(live, dh, dropping, beside, spare) if need_dx else None
        dx = None if dx is None else dx.to(self.dtype)
        return dx, [(grads_a.get(j), self._grad_b(j, live.get(j))) for j in range(len(dys))]

    def pack(self) -> tuple[Form, list[Tensor | None]]:
        """All that the backward needs besides x: tensors for `save_for_backward`, and what is no tensor."""
        form = [(m.transposed, m.low.scale, m.low.p) if m.low else (m.transposed, None, 0.0) for m in self.sites]
        tensors: list[Tensor | None] = []
        for j, module in enumerate(self.sites):
            tensors += [module.W, *factors([module]), self.h[j], self.records[j]]
        return Form(self.dtype, self.inside, tuple(form), self.trains), tensors

    @classmethod
    def unpack(cls, form: Form, tensors: Sequence[Any]) -> Group:
        """The group after its forward, from what `pack` gave."""
        sites, h, records = [], [], []
        for j, (transposed, scale, p) in enumerate(form.sites):
            W, A, B, saved, record = tensors[5 * j : 5 * j + 5]
            low = None if scale is None else LowRank(A, B, scale, p)
            sites.append(Adapted(W, None, low, transposed))
            h.append(saved)
            records.append(record)
        group = cls(sites, form.dtype, form.inside)
        group.trains, group.h, group.records = form.trains, h, records
        return group

    def _beside(self, dh: dict[int, Tensor]) -> Tensor | None:
        """The dh (N, r) of the modules without dropout, side by side as their A stand one below the other."""
        first = next((dh[j] for j in self.plain if j in dh), None)
        if first is None:
            return None
        missing = {j: first.new_zeros(len(first), len(self.low[j].A)) for j in self.plain if j not in dh}
        parts = [dh[j] if j in dh else missing[j] for j in self.plain]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _grad_x(
        self,
        dys: dict[int, Tensor],
        dh: dict[int, Tensor],
        dropping: list[int],
        beside: Tensor | None,
        spare: list[Tensor],
    ) -> Tensor | None:
        total: Tensor | None = None
        part: Tensor | None = None
        fused = self._fused(dh[dropping[0]]) if dropping else None
        for j in dropping if fused is None else ():  # first: what was dropped is zeroed before anything is added
            room = part if part is not None else _taken(spare)
            made = self._zero_(j, torch.mm(dh[j], self.A[j], out=room))
            total, part = (made, None) if total is None else (total.add_(made), made)
        if beside is not None and self.stacked is not None:
            total = product(beside, self.stacked, _taken(spare) if total is None else total, total)
        for j, dy in dys.items():
            W = self.sites[j].W.to(self.dtype)
            W = W.t() if self.sites[j].transposed else W
            total = product(dy, W, _taken(spare) if total is None else total, total)
        if fused is not None and total is not None:
            for j in dropping:
                fused.add_thin(dh[j], self.A[j], self.low[j].p, self._record(j), total)
        return total

    def _grads_a(
        self, x: Tensor, dh: dict[int, Tensor], beside: Tensor | None, owned: bool, spare: list[Tensor]
    ) -> dict[int, Tensor]:
        """s·dhᵀ·(D∘x) for each A that asks for it."""
        grads: dict[int, Tensor] = {}
        if beside is not None and any(self.trains[j][0] for j in self.plain):
            ranks = [len(self.low[j].A) for j in self.plain]
            grads.update(zip(self.plain, torch.mm(beside.t(), x).split(ranks), strict=True))
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
        """Each dropping module with its own input: in one buffer, one after the other, and the last in an owned x.

        The buffer is then one of the spare ones.
        """
        for j in dropping:
            if owned and j == dropping[-1]:
                yield j, self._zero_(j, x)
                return
            if not spare:
                spare.append(torch.empty_like(x))
            yield j, without(x, self._record(j), self.low[j].p, out=spare[0])

    def _fused(self, like: Tensor) -> DroppingProducts | None:
        """What drops out while it multiplies, where there is such for rows like these (N, n) and the A."""
        wide = [self.A[j] for j in self.dropping]
        kernels = kernels_for(like, *wide) if wide and wide[0].shape[1] % 4 == 0 else None
        seeds = all(self._record(j).dtype == torch.uint64 for j in self.dropping)
        return kernels.dropping if kernels is not None and seeds else None

    def _zero_(self, j: int, owned: Tensor) -> Tensor:
        return zero_(owned, self._record(j), self.low[j].p)

    def _record(self, j: int) -> Tensor:
        record = self.records[j]
        assert record is not None  # the forward has drawn it
        return record

    def _grad_b(self, j: int, dy: Tensor | None) -> Tensor | None:
        """dyᵀ·(s·h), computed as ((s·h)ᵀ·dy)ᵀ, which is faster for a thin h."""
        h = self.h[j]
        if h is None or dy is None:
            return None
        B = self.low[j].B
        return torch.empty(B.shape, dtype=B.dtype, device=B.device).copy_(torch.mm(h.t(), dy).t())


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: tuple[Adapted, ...], *flat: Tensor | None) -> tuple[Tensor, ...]:
        parts = Group.of(_with(group, flat), x)
        with as_written(x):
            ys = parts.forward(rows(x))
        ctx.form, tensors = parts.pack()
        ctx.shape = x.shape
        ctx.save_for_backward(x if parts.needs_x else None, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        flat = [None if dy is None else rows(dy) for dy in dys]
        with as_written(tensors[0]):
            parts = Group.unpack(ctx.form, tensors)
            dx, grads = parts.backward(None if x is None else rows(x), flat, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, *(grad for pair in grads for grad in pair)


def _with(group: Sequence[Adapted], flat: Sequence[Tensor | None]) -> list[Adapted]:
    """The group with these tensors as its factors, as `factors` orders them."""
    filled = []
    for module, A, B in zip(group, flat[::2], flat[1::2], strict=True):
        low = module.low
        if low is None or A is None or B is None or (A is low.A and B is low.B):
            filled.append(module)
        else:
            filled.append(replace(module, low=replace(low, A=A, B=B)))
    return filled


def _taken(spare: list[Tensor]) -> Tensor | None:
    return spare.pop() if spare else None


def _scale(low: LowRank) -> float:
    return low.scale / (1 - low.p)


def _scaled(low: LowRank) -> Tensor:
    """s·A (r, in), in the dtype of A."""
    return low.A * _scale(low)
