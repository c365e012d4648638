"""`Route`: which adapter each row of a batch uses, and at which positions, computed once per forward pass.

Positions are counted from the end of a row, so that they are also valid at a site that sees only the last positions.
Everything is computed on the tokens' device, and layers never read the tokens themselves. This file does not depend on
the active route, configs, layers or factors.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import RouteError, RowCountError
from lorakit.ops.segments import Routed


@dataclass(frozen=True, eq=False)
class Offsets:
    """The number of active positions at the end of each row, for adapters that are active at only some positions.

    Attributes:
        back: Number of active positions at the end of each row, (adapters, rows) int64; 0 if the adapter is not active.
        length: Number of positions per row in this forward pass, or None if it is unknown.
        seen: Number of positions per row up to the end of this forward pass, including cached ones, or None.
        whole: Whether each site must see all `length` positions, because a shorter input might not end at the last
            position.
    """

    adapters: tuple[str, ...]
    back: Tensor
    length: int | None = None
    seen: int | None = None
    whole: bool = False
    _masks: dict[tuple[str, int, bool, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)
    _parts: dict[int, tuple[Tensor, Offsets]] = field(default_factory=dict, init=False, repr=False)
    _routes: dict[int, tuple[Route, Route]] = field(default_factory=dict, init=False, repr=False)

    def of(self, adapter: str) -> Tensor:
        """Return `back` for one adapter, (rows,) int64."""
        return self.back[self.adapters.index(adapter)]

    def agrees(self, other: Offsets, names: Sequence[str]) -> bool:
        """Return whether the given adapters are active at the same positions in another forward pass."""
        if not set(names) <= set(self.adapters) & set(other.adapters):
            return False
        pairs = [(self.of(name), other.of(name)) for name in names]
        return all(one.shape == two.shape and bool((one == two).all()) for one, two in pairs)

    def later(self, length: int, seen: int, rows: int, whole: bool = False) -> Offsets:
        """Return the offsets for a forward pass that covers the same text but ends at a different position.

        The arguments are those of that forward pass, which may contain consecutive copies of each row (beams).
        """
        back = of_rows(self.back, rows)
        if self.seen is not None:
            back = torch.where(back > 0, back + (seen - self.seen), 0).clamp_min(0)
        return Offsets(self.adapters, back, length, seen, whole)

    def of_rows(self, index: Tensor) -> Offsets:
        """Return the offsets of the rows with these indices (n,), cached by the identity of the index tensor."""
        known = self._parts.get(id(index))
        if known is None:  # keep the tensor, so that its id is not reused
            back = self.back.index_select(1, index.to(self.back.device))
            known = self._parts[id(index)] = (index, Offsets(self.adapters, back, self.length, self.seen, self.whole))
        return known[1]

    def mask(self, adapter: str, z: Tensor) -> Tensor:
        """Return a boolean mask of the positions at which an adapter is active, cached per forward pass and shape.

        The adapter's output z is (rows, positions, out) or (rows · positions, out), or (rows, out) for the last
        position only; the mask is the same with 1 in place of `out`.

        Raises:
            RouteError: The positions cannot be determined from the shape of z.
        """
        rows = self.back.shape[1]
        flat = z.ndim == 2 and self.length is not None and z.shape[0] == rows * self.length
        fits = flat or (z.ndim in (2, 3) and z.shape[0] == rows)
        positions = self.length if flat else z.shape[1] if z.ndim == 3 else 1
        if not fits or positions is None or (self.whole and positions != self.length):
            raise RouteError(
                f"Adapter {adapter!r} is active from its invocation tokens onward, but the positions of a tensor of "
                f"shape {tuple(z.shape)} at one of its sites are unknown (rows in the batch: {rows}; positions per "
                f"row: {self.length or 'unknown'}). Leave the module out of target_modules.",
                what=adapter,
            )
        key = (adapter, positions, flat, z.device)
        if key not in self._masks:
            acts = torch.arange(positions, device=z.device) >= positions - self.of(adapter).to(z.device)[:, None]
            self._masks[key] = acts.reshape(-1, 1) if flat or z.ndim == 2 else acts[:, :, None]
        return self._masks[key]

    def on(self, route: Route) -> Route:
        """Return a copy of a route with these offsets, cached per route and forward pass."""
        known = self._routes.get(id(route))
        if known is None:  # keep the route, so that its id is not reused
            known = self._routes[id(route)] = (route, route.like(self, route.kept))
        return known[1]


def of_rows(numbers: Tensor, rows: int) -> Tensor:
    """Expand per-row values (…, n) to (…, rows) for consecutive copies of each row; raise a RouteError if it cannot."""
    if numbers.shape[-1] == rows:
        return numbers
    if rows % numbers.shape[-1]:
        text = f"The number of rows with known adapter starts ({numbers.shape[-1]}) does not match the batch ({rows})."
        raise RouteError(text, what=numbers.shape[-1])
    return numbers.repeat_interleave(rows // numbers.shape[-1], dim=-1)


class AdapterBank(dict[Any, Any]):
    """A cache for layers: (layer, …) → a value whose method `still(layer)` returns whether it is still valid.

    Several routes can share a bank, such as those of a server whose batches change, so that a change copies no factors.

    Args:
        slots: Number of adapters of like rank for which each layer allocates memory at first; more are possible.
        together: Adapters whose factors are added when those of any other are, because many at once take less time.
        by_row: Whether the bits of a row's result must not depend on the other rows.
        is_constant: Whether adapters stay as they are until they are released, so that nothing is checked.

    Attributes:
        thread: The thread in which all values were checked for the current forward pass, or None.
    """

    def __init__(
        self, slots: int = 0, together: Sequence[str] = (), *, by_row: bool = False, is_constant: bool = False
    ) -> None:
        super().__init__()
        self.slots, self.together, self.by_row, self.is_constant = slots, tuple(together), by_row, is_constant
        self.thread: int | None = None

    def release(self, adapter: str) -> None:
        """Forget an adapter, which no later forward pass uses under this name unless it is added again."""
        for key, value in self.copy().items():
            left = value.without(key[0], adapter)
            if left is None:
                del self[key]
            else:
                self[key] = left

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """Check all values at once and remove those that are not valid; `is_checked` is true within the block.

        Checking the values one after another takes less time than checking each one where it is used: between two
        matmuls, the objects that the check reads are no longer in the processor's cache.
        """
        if self.is_checked:  # by an outer block
            yield
            return
        for key, value in self.copy().items():
            if not value.still(key[0]):
                self.pop(key, None)
        self.thread = threading.get_ident()
        try:
            yield
        finally:
            self.thread = None

    @property
    def is_checked(self) -> bool:
        """Return whether the current thread has checked all values for this forward pass, or need not check them."""
        return self.is_constant or self.thread == threading.get_ident()


At = tuple[torch.device, int]
"""A device and the number of rows in a batch."""


@dataclass(frozen=True)
class Route:
    """The adapters that a forward pass uses.

    Attributes:
        names: Adapters that are active on every row, in order; an empty tuple means the base model alone.
        rows: One adapter per row of the batch (None for no adapter), or None if all rows use the same adapters.
        copies: Number of consecutive copies of each row that a batch may contain, as in beam search. A batch without
            copies is also valid, because encoders run before rows are repeated.
        kept: A cache for values that layers reuse in later forward passes, or None if layers must not cache anything.
        prepared: (layer, shape of the input) -> cached factors and their matmuls with this route, if it has `kept`.
        mentions: Every adapter that at least one row uses.
    """

    names: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    copies: int = 1
    offsets: Offsets | None = field(default=None, compare=False)
    kept: AdapterBank | None = field(default=None, repr=False, compare=False)
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    mentions: frozenset[str] = field(init=False, repr=False, compare=False)  # dynamo cannot trace a cached_property
    _indices: dict[At, list[tuple[str, Tensor]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _routed: dict[tuple[tuple[str | None, ...], At], Routed] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _named: list[Route] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        some = self.names if self.rows is None else filter(None, self.rows)
        object.__setattr__(self, "mentions", frozenset(some))

    def at(self, offsets: Offsets | None) -> Route:
        """Return this route with the given offsets, if any; a route that already has offsets keeps them."""
        return self if offsets is None or self.offsets is not None else offsets.on(self)

    def named(self) -> Route:
        """Return the route without offsets or a cache, so that it can be stored beyond the forward pass."""
        if self.offsets is None and self.kept is None:
            return self
        if not self._named:  # cached, since every layer needs it
            self._named.append(self.like(None, None))
        return self._named[0]

    def keeping(self, keep: AdapterBank | bool) -> Route:
        """Return this route with the given cache for layers, or a new one if True, or as it is if False."""
        if keep is False or not self.mentions or self.kept is not None:
            return self
        return self.like(self.offsets, AdapterBank() if keep is True else keep)

    def like(self, offsets: Offsets | None, kept: AdapterBank | None) -> Route:
        """Return a copy with other offsets and another cache; values that depend only on the rows are shared."""
        route = Route(self.names, self.rows, self.copies, offsets, kept)
        object.__setattr__(route, "_indices", self._indices)
        object.__setattr__(route, "_routed", self._routed)
        if kept is self.kept:
            object.__setattr__(route, "prepared", self.prepared)
        return route

    def alone(self, name: str, index: Tensor) -> Route:
        """Return the route of one adapter on its rows, with these indices (n,), of a mixed batch."""
        return Route((name,), offsets=None if self.offsets is None else self.offsets.of_rows(index))

    def acting(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Return a function that masks an adapter's output z (rows, positions, out), or None without offsets for it."""
        offsets = self.offsets
        return None if offsets is None or name not in offsets.adapters else partial(offsets.mask, name)

    def common_to_all(self, names: frozenset[str]) -> bool:
        """Return whether every row uses all of the given adapters."""
        if not names:
            return True
        if self.rows is None:
            return names <= set(self.names)
        return all(names <= {row} for row in self.rows)

    def rows_of(self, size: int) -> tuple[str | None, ...] | None:
        """Return the adapter of each row of a batch of this size, or None if the route does not match the batch."""
        rows = self.rows or ()
        if size == len(rows):
            return rows
        return tuple(row for row in rows for _ in range(self.copies)) if size == len(rows) * self.copies else None

    def mismatch(self, place: str, shape: Sequence[int] | str, what: str | None, field: str | None) -> RowCountError:
        """Return the error for a batch, with the given shape at a place, whose number of rows is not the route's."""
        text = (
            f"The number of rows in the route ({len(self.rows or ())}) does not match {place} (shape: {shape}). Pass "
            "one adapter per row of the batch; if rows are repeated, as in beam search, set `copies`."
        )
        return RowCountError(text, what=what, field=field)

    def segments(self, device: torch.device, size: int) -> list[tuple[str, Tensor]]:
        """Return each adapter with the indices of its rows, (n,) int64, cached per device and size of the batch."""
        if (device, size) not in self._indices:
            rows = self.rows_of(size) or ()
            self._indices[device, size] = [
                (name, torch.tensor([i for i, row in enumerate(rows) if row == name], device=device))
                for name in dict.fromkeys(filter(None, rows))
            ]
        return self._indices[device, size]

    def routed(self, names: tuple[str | None, ...], device: torch.device, size: int) -> Routed:
        """Return which of the given adapters each row of a batch uses, cached per device and size.

        Returns:
            The index in `names` of each row's adapter, (size,); −1 for the base and for other adapters. All indices
            are 0 if the route is the same for all rows.
        """
        key = (names, (device, size))
        if key not in self._routed:
            number = {name: k for k, name in enumerate(names)}
            everywhere = [number[name] for name in self.names if name in number][:1] * size
            rows = [number.get(row or "", -1) for row in self.rows_of(size) or ()] if self.rows else everywhere
            self._routed[key] = Routed(torch.tensor(rows, device=device), len(names))
        return self._routed[key]

    def describe(self) -> str:
        """Return a description of the route for messages."""
        if self.rows is not None:
            return "rows " + ", ".join(row or "base" for row in self.rows)
        return "adapter " + " + ".join(self.names) if self.names else "the base alone"


BASE = Route()
"""The route that uses only the base model, without adapters."""
