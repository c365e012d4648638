"""A route: which adapter each row of a batch uses, and what follows from that once, for all layers of a forward.

It knows nothing of which route is in force, of layers or of factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.core.routes.starts import Starts
from lorakit.ops.segments import Routed

At = tuple[torch.device, int]
"""A device, and the rows of a batch."""


@dataclass(frozen=True)
class Route:
    """Which adapters a forward uses.

    Attributes:
        names: Adapters that act on every row, in the order given; none of them is the base alone.
        rows: One adapter per row of the batch (None: the base alone), or None where all rows are alike.
        copies: A batch may also hold each row so many times running: beams, of which an encoder sees one.
        starts: Where adapters that wait for their invocation begin in this forward, or None where that is not known.
        kept: What layers keep from one forward with this route to the next, by layer; it goes with the route. None
            where they shall keep nothing.
        mentions: Every adapter that some row uses.
    """

    names: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    copies: int = 1
    starts: Starts | None = field(default=None, compare=False)
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

    def begun(self, starts: Starts | None) -> Route:
        """The same route in a forward whose starts are known, or without any; a route that has some keeps them."""
        if starts is None or self.starts is not None:
            return self
        if id(self) not in starts.begun:  # once per forward, not per layer
            starts.begun[id(self)] = (self, self._like(starts, self.kept))
        return starts.begun[id(self)][1]

    def named(self) -> Route:
        """The route without what is true in some forwards alone, for those who hold it longer."""
        if self.starts is None and self.kept is None:
            return self
        if not self._named:  # always the same: it is asked for by every layer
            self._named.append(self._like(None, None))
        return self._named[0]

    def keeping(self) -> Route:
        """The same route, under which layers keep what they made of its adapters."""
        return self._like(self.starts, {}) if self.mentions and self.kept is None else self

    def _like(self, starts: Starts | None, kept: dict[Any, Any] | None) -> Route:
        route = Route(self.names, self.rows, self.copies, starts, kept)
        object.__setattr__(route, "_indices", self._indices)
        object.__setattr__(route, "_routed", self._routed)
        return route

    def alone(self, name: str, index: Tensor) -> Route:
        """One adapter on its rows of a mixed batch.

        Args:
            name: The adapter.
            index: Numbers of its rows, (rows of it,).
        """
        return Route((name,), starts=None if self.starts is None else self.starts.of_rows(name, index))

    def acting(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What tells an adapter where it acts, z (rows, positions, out) -> mask, or None where that is not known."""
        return None if self.starts is None else partial(self.starts.mask, name)

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
