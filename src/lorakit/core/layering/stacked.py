"""Rows of one batch with different adapters, taken at once: their factors in stacks, two products for each.

Plain adapters of dense sites go so where no gradient is recorded; what is left, the layer takes one by one. A stack
holds adapters whose ranks are less than twice apart, the lower ones filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.kinds.dense import linear_down, linear_up
from lorakit.core.kinds.kind import first_axis
from lorakit.core.layering.factor import Factor
from lorakit.core.layering.watched import is_watched, share_dropped
from lorakit.core.routes.route import Route
from lorakit.ops.adapted import as_written, autocast
from lorakit.ops.segments import Segments, way_of

OfRows = Sequence[tuple[str, Tensor]]
Stamp = list[Any]

WORTH_A_STACK = 4
"""So many adapters pay for stacks that serve one forward alone, by measurement at width 576 and rank 16."""

_VERSION, _TRAINING = attrgetter("_version"), attrgetter("training")


@dataclass(eq=False)
class Stack:
    """Some adapters of one site.

    Attributes:
        names: Which, in the stack's order.
        A: Theirs times the scale, (K, r, in).
        B: Theirs, (K, out, r), the transposed view of a (K, r, out).
        ready: Shape of an input -> its products, under the one route that the stack is for.
    """

    names: tuple[str, ...]
    A: Tensor
    B: Tensor
    ready: dict[torch.Size, Segments] = field(default_factory=dict)

    def made_ready(self, route: Route, x: Tensor) -> Segments:
        """The products with inputs like x (rows, …, in)."""
        rows = route.routed(self.names, x.device, len(x))
        way = way_of(x, rows)
        if way == "masked" and not self.is_finite:
            way = way_of(x, rows, only_finite=False)
        made = self.ready[x.shape] = Segments(self.A, self.B, None, rows, way, x.dtype)
        return made

    @cached_property
    def is_finite(self) -> bool:
        """Whether every number is; sums tell, of which one that is too large says no as well."""
        sums = [matrices.sum(dtype=torch.promote_types(self.A.dtype, torch.float32)) for matrices in (self.A, self.B)]
        return bool(torch.stack(sums).isfinite().all())


@dataclass(eq=False)
class Stacks:
    """What was made of the adapters of one site.

    Attributes:
        stacks: Of those that can be stacked.
        rest: The others.
        stamp: What tells whether the adapters are what they were; None where that is not asked, or cannot be told.
        holds: What the numbers in the stamp speak of, so that none of it can be another thing meanwhile.
    """

    stacks: list[Stack]
    rest: tuple[str, ...]
    stamp: Stamp | None
    holds: Sequence[Any]


def add_stacked(layer: Any, segments: OfRows, route: Route, x: Tensor, y0: Tensor) -> tuple[Tensor, OfRows]:
    """What some adapters add on their rows of a mixed batch, as far as they can be taken at once.

    Args:
        layer: The site's `LoraLayer`.
        segments: The adapters, which all have a factor there, and the numbers of their rows, (rows of it,).
        route: Which row has which; where it keeps things, the stacks are made once.
        x: The input, (rows, …, in).
        y0: The base's output, (rows, …, out); it stays as it is.

    Returns:
        y₀ with what was added, and the segments of adapters that are still to be added.
    """
    kind = layer.kind
    if torch.is_grad_enabled() or kind.down is not linear_down or kind.up is not linear_up:
        return y0, segments
    x = autocast(x.to(y0.dtype))
    if x.dtype != y0.dtype or type(x) is not Tensor or type(y0) is not Tensor or kind.row_axis is not first_axis:
        return y0, segments
    if route.kept is None and len(segments) < WORTH_A_STACK:
        return y0, segments
    made = _stacks(layer, [name for name, _ in segments], route.kept, y0.dtype)
    if not made.stacks:
        return y0, segments
    y = y0.clone(memory_format=torch.contiguous_format)
    with as_written(x):
        for stack in made.stacks:
            (stack.ready.get(x.shape) or stack.made_ready(route, x)).forward(x, y)
    return y, [segment for segment in segments if segment[0] in made.rest] if made.rest else ()


def _stacks(layer: Any, names: Sequence[str], kept: dict[Any, Any] | None, dtype: torch.dtype) -> Stacks:
    """The stacks of these adapters: those that were kept, while the adapters are what they were."""
    if kept is None:
        return _made(layer, names, dtype, None, ())
    stamp, holds = _stamp(layer, names)  # first, so that what another thread changes meanwhile is seen next time
    found: Stacks | None = kept.get((layer, dtype))
    if stamp is None:
        return _made(layer, names, dtype, None, ())
    if found is None or found.stamp != stamp:
        found = kept[layer, dtype] = _made(layer, names, dtype, stamp, holds)
    return found


def _stamp(layer: Any, names: Sequence[str]) -> tuple[Stamp | None, list[Any]]:
    """What tells whether some adapters are what they were, and what it speaks of; it is asked for each token."""
    try:
        down, up = (layer._modules[attribute]._modules for attribute in layer.kind.names)
        carriers = [up[name]._parameters for name in names]
        A = [down[name]._parameters["weight"] for name in names]
        B = [parameters["weight"] for parameters in carriers]
        dropouts = list(map(layer._modules["lora_dropout"]._modules.__getitem__, names))
        versions = [*map(_VERSION, A), *map(_VERSION, B)]
    except (KeyError, RuntimeError, AttributeError):  # a factor that another makes; tensors that count no versions
        return None, []
    return [
        *names,
        *versions,
        *map(id, A),
        *map(id, B),
        *map(id, dropouts),
        *map(Tensor.data_ptr, A),
        *map(Tensor.data_ptr, B),
        *map(_TRAINING, dropouts),
        *map(layer.scaling.__getitem__, names),
        *map(layer.variant.__getitem__, names),
        *[parameters.get("bias") is None for parameters in carriers],
    ], [*A, *B, *dropouts]


def _made(layer: Any, names: Sequence[str], dtype: torch.dtype, stamp: Stamp | None, holds: Sequence[Any]) -> Stacks:
    factors = {name: layer.factor(name) for name in names}
    plain = {name: factor for name, factor in factors.items() if _can_be_stacked(factor)}
    stacks = [_stack(group, plain, dtype) for group in _of_like_rank({n: len(f.A) for n, f in plain.items()})]
    return Stacks(stacks, tuple(name for name in names if name not in plain), stamp, holds)


def _can_be_stacked(factor: Factor) -> bool:
    tensors = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (factor.A, factor.B))
    plain = factor.variant == "plain" and factor.bias is None
    return tensors and plain and share_dropped(factor.dropout) == 0 and not is_watched(factor.dropout)


def _of_like_rank(ranks: dict[str, int]) -> Iterator[list[str]]:
    """The adapters in groups of which each wastes less than half of its room, in their own order."""
    left = set(ranks)
    while left:
        highest = max(ranks[name] for name in left)
        group = [name for name in ranks if name in left and 2 * ranks[name] > highest]
        left.difference_update(group)
        yield group


def _stack(names: Sequence[str], factors: dict[str, Factor], dtype: torch.dtype) -> Stack:
    A = _filled(factors[name].A for name in names)
    B = _filled(factors[name].B.t() for name in names)
    wide = torch.promote_types(A.dtype, torch.float32)
    scales = torch.tensor([factors[name].scale for name in names], dtype=wide, device=A.device)
    return Stack(tuple(names), (A * scales[:, None, None]).to(dtype), B.to(dtype).transpose(1, 2))


def _filled(matrices: Iterable[Tensor]) -> Tensor:
    """Matrices (r, n) of some ranks in one (K, highest rank, n)."""
    found = list(matrices)
    highest = max(map(len, found))
    return torch.stack([F.pad(one, (0, 0, 0, highest - len(one))) if len(one) < highest else one for one in found])
