"""LoRA beside frozen linear modules that share one input: all their products as one function of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakit.ops.dropout import draw, zero_


@dataclass(frozen=True, eq=False)
class LowRank:
    """Factors of one adapter: A (r, in), B (out, r), the scale, and the dropout of its input that is in force now."""

    A: Tensor
    B: Tensor
    scale: float
    p: float = 0.0


@dataclass(frozen=True, eq=False)
class Adapted:
    """A frozen linear module and what is beside it: W (out, in), or (in, out) where transposed; bias (out,)."""

    W: Tensor
    bias: Tensor | None = None
    low: LowRank | None = None
    transposed: bool = False


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
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat = factors(group)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat)):
        outputs: tuple[Tensor, ...] = _Linears.apply(x, tuple(group), *flat)
        return outputs
    with torch.autocast(x.device.type, enabled=False):
        return tuple(unflat(y, x) for y in Group(group, x.dtype).forward(rows(x)))


def refuse_trained(group: Sequence[Adapted]) -> None:
    """Refuse weights that are trained: the fused operations make no gradient for them.

    Raises:
        ValueError: A weight or bias asks for a gradient.
    """
    for module in group:
        for name, tensor in (("weight", module.W), ("bias", module.bias)):
            if tensor is not None and tensor.requires_grad:
                shape = tuple(tensor.shape)
                raise ValueError(
                    f"a {name} of shape {shape} asks for a gradient, and the fused operations make none for the base; "
                    f"freeze it, or run the module itself"
                )


def factors(group: Sequence[Adapted]) -> list[Tensor | None]:
    """A_0, B_0, A_1, B_1, …: the trained inputs of a function over the group, None where a module has no adapter."""
    return [t for module in group for t in ((module.low.A, module.low.B) if module.low else (None, None))]


def rows(x: Tensor) -> Tensor:
    """Contiguous rows (N, in) of x (…, in); a view where it can be."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def unflat(y: Tensor, like: Tensor) -> Tensor:
    """Rows y (N, out) in the leading dimensions of `like` (…, in)."""
    return y.view(*like.shape[:-1], y.shape[-1])


class Form(NamedTuple):
    """What of a packed group is no tensor."""

    dtype: torch.dtype
    sites: tuple[tuple[bool, float | None, float], ...]  # transposed; scale (None: no adapter), dropout
    trains: tuple[tuple[bool, bool], ...]  # whether A, B ask for a gradient


class Group:
    """The products of modules that share one input, as a forward and a backward without autograd.

    For functions of autograd: `forward`, then `pack` for what must be saved besides x; `unpack` in their backward, then
    `backward`. Tensors that are called owned may be overwritten.
    """

    def __init__(self, group: Sequence[Adapted], dtype: torch.dtype) -> None:
        self.sites = tuple(group)
        self.dtype = dtype
        self.h: list[Tensor | None] = [None] * len(self.sites)
        self.dropped: list[Tensor | None] = [None] * len(self.sites)
        self.trains = tuple(
            (m.low.A.requires_grad, m.low.B.requires_grad) if m.low is not None else (False, False) for m in group
        )
        self.adapted = [(j, m.low) for j, m in enumerate(self.sites) if m.low is not None]
        self.plain = [j for j, low in self.adapted if low.p == 0]
        self.dropping = [j for j, low in self.adapted if low.p > 0]
        self.A = {j: low.A.detach().to(dtype) for j, low in self.adapted}
        # the scale, and what the dropout divides by, go into the small operand
        self.B = {j: (low.B.detach() * _scale(low)).to(dtype) for j, low in self.adapted}

    @property
    def needs_x(self) -> bool:
        """Whether the backward asks for x: only the gradient of an A does."""
        return any(A for A, _ in self.trains)

    def forward(self, x: Tensor, owned: bool = False) -> list[Tensor]:
        """The outputs (N, out) for x (N, in); an owned x is not what it was afterwards."""
        ys = [self._base(x, site) for site in self.sites]
        hs: dict[int, Tensor] = {}
        if self.plain:
            ranks = [len(self.A[j]) for j in self.plain]
            hs.update(zip(self.plain, torch.mm(x, self._stacked(self.plain).t()).split(ranks, 1), strict=True))
        for j, kept in self._drops(x, owned, fresh=True):
            hs[j] = torch.mm(kept, self.A[j].t())
        for j, h in hs.items():
            ys[j].addmm_(h, self.B[j].t())
            self.h[j] = h if self.trains[j][1] else None
        return ys

    def backward(
        self, x: Tensor | None, dys: Sequence[Tensor | None], need_dx: bool = True, owned: bool = False
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
        """The gradients of x (N, in), where asked for, and of each (A, B), from those of the outputs (N, out).

        x may be None where `needs_x` is false; an owned x is not what it was afterwards. An output that has no gradient
        is None.
        """
        live = [j for j, _ in self.adapted if dys[j] is not None and (need_dx or self.trains[j][0])]
        dh = {j: torch.mm(dys[j], self.B[j]) for j in live}  # type: ignore[arg-type]
        grads_b = [self._grad_b(j, dy) for j, dy in enumerate(dys)]
        dx = self._grad_x(dys, dh) if need_dx else None
        grads_a = self._grads_a(x, dh, owned)
        return dx, [(grads_a.get(j), grad) for j, grad in enumerate(grads_b)]

    def pack(self) -> tuple[Form, list[Tensor | None]]:
        """All that the backward needs besides x: tensors for `save_for_backward`, and what is no tensor."""
        form = [(m.transposed, m.low.scale, m.low.p) if m.low else (m.transposed, None, 0.0) for m in self.sites]
        tensors: list[Tensor | None] = []
        for j, module in enumerate(self.sites):
            tensors += [module.W, *factors([module]), self.h[j], self.dropped[j]]
        return Form(self.dtype, tuple(form), self.trains), tensors

    @classmethod
    def unpack(cls, form: Form, tensors: Sequence[Any]) -> Group:
        """The group after its forward, from what `pack` gave."""
        sites, h, drops = [], [], []
        for j, (transposed, scale, p) in enumerate(form.sites):
            W, A, B, saved_h, record = tensors[5 * j : 5 * j + 5]
            low = None if scale is None else LowRank(A, B, scale, p)
            sites.append(Adapted(W, None, low, transposed))
            h.append(saved_h)
            drops.append(record)
        group = cls(sites, form.dtype)
        group.trains, group.h, group.dropped = form.trains, h, drops
        return group

    def _base(self, x: Tensor, site: Adapted) -> Tensor:
        W, bias = site.W.to(self.dtype), None if site.bias is None else site.bias.to(self.dtype)
        return F.linear(x, W.t() if site.transposed else W, bias)

    def _stacked(self, chosen: list[int]) -> Tensor:
        """The A of these modules, one below the other (Σ r, in)."""
        return self.A[chosen[0]] if len(chosen) == 1 else torch.cat([self.A[j] for j in chosen])

    def _drops(self, x: Tensor, owned: bool, fresh: bool) -> Any:
        """Each dropping module with its input, made in one buffer, one after the other; the last in an owned x."""
        buffer: Tensor | None = None
        for j in self.dropping:
            if fresh:
                self.dropped[j] = draw(x, self.sites[j].low.p)  # type: ignore[union-attr]
            if owned and j == self.dropping[-1]:
                buffer = x
            elif buffer is None:
                buffer = x.clone()
            else:
                buffer.copy_(x)
            yield j, zero_(buffer, self.dropped[j])  # type: ignore[arg-type]

    def _grad_b(self, j: int, dy: Tensor | None) -> Tensor | None:
        """s·dyᵀ·h, computed as (hᵀ·dy)ᵀ, which is faster for a thin h."""
        low, h = self.sites[j].low, self.h[j]
        if low is None or h is None or dy is None or not self.trains[j][1]:
            return None
        grad = torch.empty(low.B.shape, dtype=low.B.dtype, device=dy.device)
        return grad.copy_(torch.mm(h.t(), dy).t()).mul_(_scale(low))

    def _grads_a(self, x: Tensor | None, dh: dict[int, Tensor], owned: bool) -> dict[int, Tensor]:
        grads: dict[int, Tensor] = {}
        wanted = {j for j in dh if self.trains[j][0]}
        if x is None or not wanted:
            return grads
        plain = [j for j in self.plain if j in wanted]
        if plain:
            stacked = torch.mm(_beside([dh[j] for j in plain]).t(), x)
            grads.update(zip(plain, stacked.split([dh[j].shape[1] for j in plain]), strict=True))
        for j, kept in self._drops(x, owned, fresh=False):
            if j in wanted:
                grads[j] = torch.mm(dh[j].t(), kept)
        return {j: grad.to(self.sites[j].low.A.dtype) for j, grad in grads.items()}  # type: ignore[union-attr]

    def _grad_x(self, dys: Sequence[Tensor | None], dh: dict[int, Tensor]) -> Tensor | None:
        total: Tensor | None = None
        for j in self.dropping:  # first, since what was dropped must be zeroed before anything is added
            if j in dh:
                part = zero_(torch.mm(dh[j], self.A[j]), self.dropped[j])  # type: ignore[arg-type]
                total = part if total is None else total.add_(part)
        for site, dy in zip(self.sites, dys, strict=True):
            if dy is not None:
                W = site.W.to(self.dtype)
                W = W.t() if site.transposed else W
                total = torch.mm(dy, W) if total is None else total.addmm_(dy, W)
        plain = [j for j in self.plain if j in dh]
        if plain and total is not None:
            total.addmm_(_beside([dh[j] for j in plain]), self._stacked(plain))
        return total


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: tuple[Adapted, ...], *flat: Tensor | None) -> tuple[Tensor, ...]:
        parts = Group(_with(group, flat), x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            ys = parts.forward(rows(x))
        ctx.form, tensors = parts.pack()
        ctx.shape = x.shape
        ctx.save_for_backward(x if parts.needs_x else None, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(unflat(y, x) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        parts = Group.unpack(ctx.form, tensors)
        flat = [None if dy is None else rows(dy) for dy in dys]
        device = tensors[0].device.type
        with torch.autocast(device, enabled=False):
            dx, grads = parts.backward(None if x is None else rows(x), flat, ctx.needs_input_grad[0])
        return (
            None if dx is None else dx.view(ctx.shape),
            None,
            *(grad for pair in grads for grad in pair),
        )


def _with(group: Sequence[Adapted], flat: Sequence[Tensor | None]) -> list[Adapted]:
    """The group with these tensors as its factors, as `factors` orders them."""
    filled = []
    for module, A, B in zip(group, flat[::2], flat[1::2], strict=True):
        low = module.low
        filled.append(module if low is None or A is None or B is None else replace(module, low=replace(low, A=A, B=B)))
    return filled


def _scale(low: LowRank) -> float:
    return low.scale / (1 - low.p)


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
