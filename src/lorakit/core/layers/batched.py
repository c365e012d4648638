"""Factors that are not applied one by one: stacked for mixed batches, or called because they have hooks.

In a mixed batch, the factors of several adapters are stacked, so that a few matmuls cover all rows.

Plain LoRA adapters on dense layers are stacked if gradients are not recorded; all others are applied one by one.
A stack holds adapters whose ranks are rounded up to the same power of two; their factors are padded with zeros. If the
route has a cache (`AdapterBank`) and all rows use the same adapter, a copy of its factors in the base dtype is cached
as a stack.

If a module that holds A or B has a hook, both are called, so that the hook runs; otherwise, they are only read, because
that takes less time and memory. Only the factors of dense layers can be called, for variants that multiply the stored A
and B; the hooks of all others do not run. Hooks of DeepSpeed ZeRO-3 free A and B after the call, so they are not called
for variants that read A and B again, such as DoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as of_modules

from lorakit.core.clones import is_watched, share_dropped
from lorakit.core.factor import FactorWeight
from lorakit.core.kinds.kind import first_axis, linear_down, linear_up
from lorakit.core.layers.factor_versions import FactorVersions
from lorakit.core.layers.stored_weight import StoredWeight
from lorakit.core.quantization.int8_linear import Int8Linear
from lorakit.core.routing.route import AdapterBank, Route
from lorakit.core.shards import is_freed_by_zero
from lorakit.core.variants import Factor, variant_named
from lorakit.identity.identities import is_plain_linear
from lorakit.ops.autograd import autocast, is_traced, without_autocast
from lorakit.ops.segments import (
    Method,
    PerRowLora,
    Routed,
    Segments,
    are_few,
    compiled_method,
    is_short_chunk,
    method_for,
)

OfRows = Sequence[tuple[str, Tensor]]

WORTH_A_STACK = 4
"""Minimum number of adapters for which a stack pays off in one forward pass, measured at width 576 and rank 16."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The stacked factors of adapters of like rank at one site.

    Attributes:
        names: The adapter in each slot, or None for a free slot, whose factors are zero.
        A: The adapters' A factors, (K, r, in), each multiplied by the adapter's scale.
        B: The adapters' B factors, (K, out, r), as a transposed view of a (K, r, out) tensor.
    """

    names: tuple[str | None, ...]
    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Return r."""
        return self.A.shape[1]

    def matmuls(self, route: Route, x: Tensor) -> Segments | PerRowLora:
        """Prepare the matmuls of a route for inputs of the same shape as x (rows, …, in)."""
        rows = route.routed(self.names, x.device, len(x))
        by_row = route.kept is not None and route.kept.by_row
        fits = is_short_chunk(x) if by_row else are_few(x, rows)
        own = compiled_method(self.A, self.B, None, rows, x) if fits else None
        return own or Segments(self.A, self.B, None, rows, "rows" if by_row else self._method(x, rows), x.dtype)

    def _method(self, x: Tensor, rows: Routed) -> Method:
        method = method_for(x, rows)
        return method_for(x, rows, only_finite=False) if method == "masked" and not self.is_finite else method

    @cached_property
    def Bt(self) -> Tensor:
        """Return the B factors, transposed, (K, r, out), which are contiguous."""
        return self.B.transpose(1, 2)

    @cached_property
    def is_finite(self) -> bool:
        """True if all values are finite, judged by their sums; a sum that overflows counts as not finite."""
        sums = [matrices.sum(dtype=torch.promote_types(self.A.dtype, torch.float32)) for matrices in (self.A, self.B)]
        return bool(torch.stack(sums).isfinite().all())

    def replaced(self, old: str | None, new: str | None, factor: Factor | None = None) -> Stack:
        """Put an adapter into the slot of another one, or into a free slot; nothing else in the memory changes."""
        slot = self.names.index(old)
        for matrices in (self.A, self.B.transpose(1, 2)):
            matrices[slot].zero_()
        if factor is not None:
            wide = torch.promote_types(factor.A.dtype, torch.float32)
            self.A[slot, : len(factor.A)] = factor.A.to(wide) * factor.scale
            self.B[slot, :, : len(factor.A)] = factor.B
        return Stack((*self.names[:slot], new, *self.names[slot + 1 :]), self.A, self.B)

    def wider(self, slots: int) -> Stack:
        """Return a copy with more free slots."""
        A, Bt = (F.pad(one, (0, 0, 0, 0, 0, slots)) for one in (self.A, self.B.transpose(1, 2)))
        return Stack((*self.names, *[None] * slots), A, Bt.transpose(1, 2))


@dataclass(eq=False)
class Stacks:
    """The stacks for a set of adapters at one site.

    Attributes:
        rest: Adapters that cannot be stacked.
        names: All adapters in the set, stacked or not.
        absent: Adapters that some rows use but that have no factors at the site.
        seen: Versions of the adapters' factors, or None if the stacks are not cached.
    """

    stacks: list[Stack]
    rest: tuple[str, ...]
    names: tuple[str, ...]
    absent: frozenset[str] = frozenset()
    seen: FactorVersions | None = None

    def still(self, layer: StoredWeight) -> bool:
        """Return whether the stacks still match the layer's factors."""
        return self.seen is not None and self.seen.still(layer) and self.absent.isdisjoint(layer.r)

    def matmuls(self, layer: StoredWeight, route: Route, x: Tensor) -> list[Segments | PerRowLora]:
        """Return the matmuls for inputs of the same shape as x (rows, …, in), and cache them if the route has a cache.

        They are not cached if the route uses an adapter that is not stacked.
        """
        stacks, known = route.prepared.get((layer, x.shape), (None, []))
        if stacks is not self:
            acting = [stack for stack in self.stacks if not route.mentions.isdisjoint(filter(None, stack.names))]
            known = [stack.matmuls(route, x) for stack in acting]
            if route.kept is not None and route.mentions.isdisjoint(self.rest):
                route.prepared[layer, x.shape] = self, known
        return known

    def without(self, layer: StoredWeight, name: str) -> Stacks | None:
        """Return the stacks with the slot of an adapter cleared and free, or None if there is no adapter left."""
        names = tuple(other for other in self.names if other != name)
        if not names or (self.seen is not None and not self.still(layer)):
            return None
        stacks = [stack.replaced(name, None) if name in stack.names else stack for stack in self.stacks]
        rest = tuple(other for other in self.rest if other != name)
        seen = None if self.seen is None else FactorVersions(layer, names)
        return Stacks(stacks, rest, names, self.absent - {name}, seen)


def add_kept(layer: StoredWeight, route: Route, x: Tensor, y0: Tensor) -> Tensor | None:
    """Add the adapters of a route with a cache to the base output y₀ (rows, …, out), given the input x (rows, …, in).

    Cached stacks are used; if all rows use the same adapter and it has no valid stack yet, a stack is created. The
    `LoraLayer` must have no merged adapters. Return None if nothing was added and y₀ is unchanged.
    """
    y = _again(layer, route, x, y0)
    if y is not None or route.rows is not None:
        return y
    names = [name for name in route.names if name in layer.r]
    if len(names) != 1:
        return None
    y, left = add_stacked(layer, [(names[0], x)], route, x, y0)
    return None if left else y


def _again(layer: StoredWeight, route: Route, x: Tensor, y0: Tensor) -> Tensor | None:
    """Return the output computed from cached stacks; None if they are outdated or do not cover this input."""
    kept = route.kept or AdapterBank()
    prepared = route.prepared.get((layer, x.shape))
    if prepared is None or kept.get((layer, y0.dtype)) is not prepared[0]:
        return None
    stacks, products = prepared
    if type(x) is not Tensor or type(y0) is not Tensor or x.dtype != y0.dtype:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or is_traced():
        return None
    if not (kept.is_checked or stacks.still(layer)):
        return None
    y = _own(layer, y0)
    for each in products:
        each.forward(x, y)
    return y


def add_stacked(layer: StoredWeight, segments: OfRows, route: Route, x: Tensor, y0: Tensor) -> tuple[Tensor, OfRows]:
    """Apply the adapters that can be stacked, each to its own rows of a mixed batch.

    Args:
        layer: The site's `LoraLayer`.
        segments: Each adapter, paired with the indices of its rows, (n,); all adapters must have factors at the site.
        route: The route, which assigns an adapter to each row; if it has a cache, the stacks are built only once.
        x: The input, (rows, …, in).
        y0: The base output, (rows, …, out), which is modified in place if nothing else can refer to it.

    Returns:
        y₀ with the additions, and the segments of the adapters that still have to be applied.
    """
    kind = layer.kind
    if torch.is_grad_enabled() or kind.down is not linear_down or kind.up is not linear_up or is_traced():
        return y0, segments
    x = autocast(x.to(y0.dtype))
    if x.dtype != y0.dtype or type(x) is not Tensor or type(y0) is not Tensor or kind.row_axis is not first_axis:
        return y0, segments
    if x.dim() < 2 or (route.kept is None and len(segments) < WORTH_A_STACK):
        return y0, segments
    stacked = _stacks(layer, tuple(name for name, _ in segments), route, y0.dtype)
    if not stacked.stacks:
        return y0, segments
    y = _own(layer, y0)
    with without_autocast(x):
        for each in stacked.matmuls(layer, route, x):
            each.forward(x, y)
    return y, [segment for segment in segments if segment[0] in stacked.rest] if stacked.rest else ()


def kept_stacks(layer: StoredWeight, route: Route, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """Return the cached stacks that a route uses at a site, for inputs like x (rows, …, in), or None if it is unknown.

    Returns:
        A (K, r, in) with the scales, B transposed (K, r, out), and the index of each row's adapter, (rows,), −1 for
        none; empty if no adapter of the route has factors at the site.
    """
    acting = [name for name in route.mentions if name in layer.r]
    if not acting:
        return []
    kept = route.kept
    if kept is None or not (kept.by_row and kept.is_checked) or (route.rows is None and len(acting) > 1):
        return None
    stacks: Stacks | None = kept.get((layer, x.dtype))
    if stacks is None or any(name not in stacks.names or name in stacks.rest for name in acting):
        return None
    used = [stack for stack in stacks.stacks if not route.mentions.isdisjoint(filter(None, stack.names))]
    return [(each.A, each.Bt, route.routed(each.names, x.device, len(x)).index) for each in used]


def _own(layer: StoredWeight, y0: Tensor) -> Tensor:
    """Return y0 (rows, …, out) for modification in place, or a copy if something else may refer to it."""
    base = layer._modules["base_layer"]
    is_plain = is_plain_linear(base) and type(base._parameters.get("weight")) is nn.Parameter
    fresh = (
        (is_plain or type(base) is Int8Linear)
        and y0.is_contiguous()
        and not is_watched(base)
        and not of_modules._global_forward_hooks
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
    )
    return y0 if fresh else y0.clone(memory_format=torch.contiguous_format)


def _stacks(layer: StoredWeight, names: tuple[str, ...], route: Route, dtype: torch.dtype) -> Stacks:
    """Return stacks with the given adapters: those of the cache, to which missing adapters are added, or new ones."""
    kept = route.kept
    if kept is None:
        return _added(layer, Stacks([], (), ()), names, dtype)
    found: Stacks | None = kept.get((layer, dtype))
    if found is None or not (kept.is_checked or found.still(layer)):
        found = Stacks([], (), ())
    if all(name in found.names for name in names):
        return found
    wanted = dict.fromkeys((*names, *(name for name in kept.together if name in layer.r)))
    missing = tuple(name for name in wanted if name not in found.names)
    try:  # before stacking, to detect changes by other threads
        seen = None if kept.is_constant else FactorVersions(layer, (*found.names, *missing))
    except (KeyError, RuntimeError, AttributeError):  # another layer's factor, or tensors without versions
        return _added(layer, Stacks([], (), ()), names, dtype)
    made = kept[layer, dtype] = _added(layer, found, missing, dtype, kept.slots)
    made.seen, made.absent = seen, found.absent | route.mentions.difference(made.names)
    return made


def _added(layer: StoredWeight, stacks: Stacks, names: tuple[str, ...], dtype: torch.dtype, slots: int = 0) -> Stacks:
    """Add adapters to stacks; a new stack has at least the given number of slots."""
    factors = {name: layer.factor(name) for name in names}
    plain = {name: f for name, f in factors.items() if _can_be_stacked(f) and called_factors(layer, name) is None}
    by_rank = {stack.rank: stack for stack in stacks.stacks}
    for rank, group in _of_like_rank(plain).items():
        by_rank[rank] = _put(by_rank[rank], group) if rank in by_rank else _stack(group, rank, dtype, slots)
    rest = tuple(name for name in names if name not in plain)
    return Stacks(list(by_rank.values()), (*stacks.rest, *rest), (*stacks.names, *names))


def _can_be_stacked(factor: Factor) -> bool:
    tensors = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (factor.A, factor.B))
    plain = factor.variant.is_lora and factor.bias is None
    return tensors and plain and share_dropped(factor.dropout) == 0 and not is_watched(factor.dropout)


def _of_like_rank(factors: dict[str, Factor]) -> dict[int, dict[str, Factor]]:
    """Group adapters by rank, rounded up to a power of two."""
    groups: dict[int, dict[str, Factor]] = {}
    for name, factor in factors.items():
        groups.setdefault(1 << (len(factor.A) - 1).bit_length(), {})[name] = factor
    return groups


def _put(stack: Stack, factors: dict[str, Factor]) -> Stack:
    """Put adapters into free slots of a stack, which is doubled if there are too few."""
    missing = len(factors) - stack.names.count(None)
    if missing > 0:
        stack = stack.wider(max(missing, len(stack.names)))
    for name, factor in factors.items():
        stack = stack.replaced(None, name, factor)
    return stack


def _stack(factors: dict[str, Factor], rank: int, dtype: torch.dtype, slots: int) -> Stack:
    """Stack factors, zero-padded to a rank, in the first of at least the given number of slots."""
    A, Bt = (_filled(matrices, rank) for matrices in zip(*((f.A, f.B.t()) for f in factors.values()), strict=True))
    wide = torch.promote_types(A.dtype, torch.float32)
    scales = torch.tensor([factor.scale for factor in factors.values()], dtype=wide, device=A.device)
    stack = Stack(tuple(factors), (A * scales[:, None, None]).to(dtype), Bt.to(dtype).transpose(1, 2))
    return stack.wider(slots - len(factors)) if slots > len(factors) else stack


def _filled(matrices: Sequence[Tensor], rank: int) -> Tensor:
    """Stack matrices (r, n) of different ranks into one zero-padded tensor (K, rank, n)."""
    return torch.stack([F.pad(one, (0, 0, 0, rank - len(one))) if len(one) < rank else one for one in matrices])


def called_factors(layer: StoredWeight, name: str) -> tuple[nn.Module, nn.Module] | None:
    """Return the modules that hold A and B of an adapter if they must be called because one of them has a hook."""
    kind = layer.kind
    if kind.down is not linear_down:
        return None
    down, up = (layer._modules[attribute]._modules[name] for attribute in kind.names)
    if type(down) is not FactorWeight or type(up) is not FactorWeight or not (is_watched(down) or is_watched(up)):
        return None
    variant = variant_named(layer.variant[name])
    if variant.output is not None and is_freed_by_zero(down.weight):
        return None
    return (down, up) if variant.factors is None and variant.down is None else None


def called_product(layer: StoredWeight, name: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return s·B(A(x)), (…, out), including the bias of B, for x (…, in), if A and B must be called, else None.

    As in PEFT, x is cast to the dtype of A first, unless `layer.cast_input_dtype_enabled` is false.
    """
    called = called_factors(layer, name)
    if called is None:
        return None
    down, up = called
    h = down(x.to(down.get_parameter("weight").dtype) if layer.cast_input_dtype_enabled else x)
    product: Tensor = up(h)
    return product.to(dtype) * layer.scaling[name]
