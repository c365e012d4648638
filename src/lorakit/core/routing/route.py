"""A route: which adapter each row of a batch uses, and on which positions, once for all layers of a forward.

Positions are counted from the end of what a row holds, so that a site that sees only the last positions needs no more.
Everything is computed on the device of the tokens; no layer looks at tokens. It knows nothing of which route is in
force, of configs, layers or factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import RouteError
from lorakit.ops.segments import Routed


@dataclass(frozen=True, eq=False)
class Offsets:
    """On how many of the last positions of each row adapters act, for adapters that do not act on all.

    Attributes:
        adapters: The adapters that it knows.
        back: The number per adapter and row, (adapters, rows) int64, 0 if the adapter does not act in the row.
        length: Positions of each row in this forward, or None if that is not known.
        seen: Positions of each row up to the end of this forward, those in a cache included, or None.
        whole: A site that sees fewer positions than `length` cannot tell which they are.
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
        """Return the numbers of one adapter, (rows,) int64.

        Args:
            adapter: One of `adapters`.
        """
        return self.back[self.adapters.index(adapter)]

    def agrees(self, other: Offsets, names: Sequence[str]) -> bool:
        """Return whether adapters act on the same positions in another forward.

        Args:
            other: The other forward's.
            names: The adapters.
        """
        if not set(names) <= set(self.adapters) & set(other.adapters):
            return False
        pairs = [(self.of(name), other.of(name)) for name in names]
        return all(one.shape == two.shape and bool((one == two).all()) for one, two in pairs)

    def later(self, length: int, seen: int, rows: int, whole: bool = False) -> Offsets:
        """Return the offsets of another forward over the same text, which ends earlier or later.

        Args:
            length: Positions of each of its rows.
            seen: Positions up to its end, those in a cache included.
            rows: The number of its rows; each row here may be there several times in succession (beams).
            whole: As the attribute.

        Raises:
            RouteError: The number of rows does not fit.
        """
        back = of_rows(self.back, rows)
        if self.seen is not None:
            back = torch.where(back > 0, back + (seen - self.seen), 0).clamp_min(0)
        return Offsets(self.adapters, back, length, seen, whole)

    def of_rows(self, index: Tensor) -> Offsets:
        """Return the offsets of some rows, made once for the same tensor of numbers.

        Args:
            index: Numbers of the rows, (rows of it,).
        """
        known = self._parts.get(id(index))
        if known is None:  # the tensor is held, so that no other one has its id
            back = self.back.index_select(1, index.to(self.back.device))
            known = self._parts[id(index)] = (index, Offsets(self.adapters, back, self.length, self.seen, self.whole))
        return known[1]

    def mask(self, adapter: str, z: Tensor) -> Tensor:
        """Return where an adapter acts, true or false, shaped to multiply z; made once per forward and shape.

        Args:
            adapter: One of `adapters`.
            z: What it adds, (rows, positions, out), (rows · positions, out), or (rows, out) for the last position.

        Returns:
            (rows, positions, 1), (rows · positions, 1) or (rows, 1).

        Raises:
            RouteError: z has no such axes, so that the positions in it cannot be told.
        """
        rows = self.back.shape[1]
        flat = z.ndim == 2 and self.length is not None and z.shape[0] == rows * self.length
        fits = flat or (z.ndim in (2, 3) and z.shape[0] == rows)
        positions = self.length if flat else z.shape[1] if z.ndim == 3 else 1
        if not fits or positions is None or (self.whole and positions != self.length):
            raise RouteError(
                f"Adapter {adapter!r} acts from its invocation tokens on, and a site received {tuple(z.shape)} where "
                f"the batch has {rows} rows of {self.length or 'so many'} positions, so its positions are not known. "
                "Leave the module out of target_modules."
            )
        key = (adapter, positions, flat, z.device)
        if key not in self._masks:
            acts = torch.arange(positions, device=z.device) >= positions - self.of(adapter).to(z.device)[:, None]
            self._masks[key] = acts.reshape(-1, 1) if flat or z.ndim == 2 else acts[:, :, None]
        return self._masks[key]

    def on(self, route: Route) -> Route:
        """Return a route with these offsets, made once per route and forward, not per layer."""
        known = self._routes.get(id(route))
        if known is None:  # the route is held, so that no other one has its id
            known = self._routes[id(route)] = (route, route.like(self, route.kept))
        return known[1]


def of_rows(numbers: Tensor, rows: int) -> Tensor:
    """Return numbers per row for a batch that has each row several times in succession, (…, rows).

    Args:
        numbers: One per row, (…, n).
        rows: Rows of the batch.

    Raises:
        RouteError: They are not a multiple.
    """
    if numbers.shape[-1] == rows:
        return numbers
    if rows % numbers.shape[-1]:
        raise RouteError(
            f"Where adapters begin was found for {numbers.shape[-1]} rows, and the batch has {rows}. Give a batch, or "
            "a cache, with the same rows."
        )
    return numbers.repeat_interleave(rows // numbers.shape[-1], dim=-1)


At = tuple[torch.device, int]
"""A device, and the rows of a batch."""


@dataclass(frozen=True)
class Route:
    """Which adapters a forward uses.

    Attributes:
        names: Adapters that act on every row, in the order given; none of them is the base alone.
        rows: One adapter per row of the batch (None: the base alone), or None where all rows are alike.
        copies: A batch may also hold each row so many times running: beams, of which an encoder sees one.
        offsets: On which positions adapters act that do not act on all, or None if that is not known.
        kept: What layers keep from one forward with this route to the next, by layer; it goes with the route. None
            where they shall keep nothing.
        mentions: Every adapter that some row uses.
    """

    names: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    copies: int = 1
    offsets: Offsets | None = field(default=None, compare=False)
    kept: dict[Any, Any] | None = field(default=None, repr=False, compare=False)
    mentions: frozenset[str] = field(init=False, repr=False, compare=False)  # not cached: dynamo cannot trace the lock
    _indices: dict[At, list[tuple[str, Tensor]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _routed: dict[tuple[tuple[str, ...], At], Routed] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _named: list[Route] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        some = self.names if self.rows is None else filter(None, self.rows)
        object.__setattr__(self, "mentions", frozenset(some))

    def at(self, offsets: Offsets | None) -> Route:
        """Return the same route in a forward with some offsets, or without any; a route that has some keeps them."""
        return self if offsets is None or self.offsets is not None else offsets.on(self)

    def named(self) -> Route:
        """The route without what is true in some forwards alone, for those who hold it longer."""
        if self.offsets is None and self.kept is None:
            return self
        if not self._named:  # always the same: it is asked for by every layer
            self._named.append(self.like(None, None))
        return self._named[0]

    def keeping(self) -> Route:
        """The same route, under which layers keep what they made of its adapters."""
        return self.like(self.offsets, {}) if self.mentions and self.kept is None else self

    def like(self, offsets: Offsets | None, kept: dict[Any, Any] | None) -> Route:
        """Return the same route with other offsets and kept things; what follows from its rows is shared."""
        route = Route(self.names, self.rows, self.copies, offsets, kept)
        object.__setattr__(route, "_indices", self._indices)
        object.__setattr__(route, "_routed", self._routed)
        return route

    def alone(self, name: str, index: Tensor) -> Route:
        """One adapter on its rows of a mixed batch.

        Args:
            name: The adapter.
            index: Numbers of its rows, (rows of it,).
        """
        return Route((name,), offsets=None if self.offsets is None else self.offsets.of_rows(index))

    def acting(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Return what masks an adapter's output, z (rows, positions, out) -> mask, or None if that is not known."""
        offsets = self.offsets
        return None if offsets is None or name not in offsets.adapters else partial(offsets.mask, name)

    def common_to_all(self, names: frozenset[str]) -> bool:
        """Whether every row uses each of these adapters."""
        if not names:
            return True
        if self.rows is None:
            return names <= set(self.names)
        return all(names <= {row} for row in self.rows)

    def rows_of(self, size: int) -> tuple[str | None, ...] | None:
        """The adapter of each row of a batch, or None where the route does not fit it.

        Args:
            size: Rows of the batch.
        """
        rows = self.rows or ()
        if size == len(rows):
            return rows
        return tuple(row for row in rows for _ in range(self.copies)) if size == len(rows) * self.copies else None

    def segments(self, device: torch.device, size: int) -> list[tuple[str, Tensor]]:
        """The rows of each adapter, made once per device and size and kept.

        Args:
            device: Where the indices shall live.
            size: Rows of the batch, which the route fits.

        Returns:
            Pairs of an adapter and its row numbers, (rows of it,) int64; rows of the base appear in none.
        """
        if (device, size) not in self._indices:
            rows = self.rows_of(size) or ()
            self._indices[device, size] = [
                (name, torch.tensor([i for i, row in enumerate(rows) if row == name], device=device))
                for name in dict.fromkeys(filter(None, rows))
            ]
        return self._indices[device, size]

    def routed(self, names: tuple[str, ...], device: torch.device, size: int) -> Routed:
        """Which of some adapters each row uses, made once per device and size and kept.

        Args:
            names: The adapters, in the order of a stack of their factors.
            device: Where its tensors shall live.
            size: Rows of the batch, which the route fits.

        Returns:
            The rows' numbers among the names, (size,), −1 for the base and for adapters that are not among them; the
            first of the names for all rows where the route has no rows.
        """
        key = (names, (device, size))
        if key not in self._routed:
            number = {name: k for k, name in enumerate(names)}
            rows = [number.get(row or "", -1) for row in self.rows_of(size) or ()] if self.rows else [0] * size
            self._routed[key] = Routed(torch.tensor(rows, device=device), len(names))
        return self._routed[key]

    def describe(self) -> str:
        """The route in words, for messages."""
        if self.rows is not None:
            return "rows " + ", ".join(row or "base" for row in self.rows)
        return "adapter " + " + ".join(self.names) if self.names else "the base alone"


BASE = Route()
"""The base alone."""
