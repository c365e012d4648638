"""Where adapters that wait for their invocation tokens (aLoRA) begin in the rows of a forward.

Counted from the end of what a row holds, so that a site which sees only the last positions needs no more. All of it is
computed on the tokens' own device, once per forward and adapter; no layer looks at tokens. It knows nothing of
adapters' configs, of the route, or of models.

A route: which adapter each row of a batch uses, and what follows from that once, for all layers of a forward.

It knows nothing of which route is in force, of layers or of factors.
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


def last_invocation(input_ids: Tensor, tokens: Sequence[int], visible: Tensor | None = None) -> Tensor:
    """Where the last occurrence of some tokens begins in each row.   [docs/math.md (90)]

    Args:
        input_ids: (rows, length), whole numbers.
        tokens: The invocation tokens, in order.
        visible: (rows, length), true where a token counts; an occurrence that touches padding is none.

    Returns:
        (rows,) int64: how many positions there are from its first token to the end of the row, 0 where it is not there.
    """
    rows, length = input_ids.shape
    size = len(tokens)
    if size > length or size == 0:
        return input_ids.new_zeros(rows, dtype=torch.int64)
    wanted = torch.tensor(list(tokens), dtype=input_ids.dtype, device=input_ids.device)
    found = (input_ids.unfold(1, size, 1) == wanted).all(-1)  # (rows, length - size + 1)
    if visible is not None:
        found = found & visible.bool().unfold(1, size, 1).all(-1)
    numbers = torch.arange(1, found.shape[1] + 1, device=found.device)
    last = (found * numbers).amax(1)
    return torch.where(last > 0, length + 1 - last, 0)


class Starts:
    """How many of the last positions of each row an adapter acts on, for every adapter that waits.

    Attributes:
        length: Positions of each row in this forward, or None where that is not known.
        seen: Positions of each row up to the end of this forward, those in a cache among them, or None.
        whole: A site that sees fewer positions than `length` cannot tell which they are.
    """

    def __init__(
        self,
        find: Callable[[str], Tensor],
        length: int | None = None,
        seen: int | None = None,
        whole: bool = False,
    ) -> None:
        self.length, self.seen, self.whole = length, seen, whole
        self._find = find
        self.found: dict[str, Tensor] = {}
        self._masks: dict[tuple[str, int, bool, torch.device], Tensor] = {}
        self._parts: dict[str, Starts] = {}
        self.begun: dict[int, tuple[Any, Any]] = {}  # of routes: each, and itself with these starts

    def back(self, name: str) -> Tensor:
        """So many of the last positions of each row, (rows,) int64, 0 where the row does not invoke it.

        Args:
            name: The adapter.
        """
        if name not in self.found:
            self.found[name] = self._find(name)
        return self.found[name]

    def agrees(self, other: Starts, names: Sequence[str]) -> bool:
        """Whether these adapters begin at the same places in another forward.

        Args:
            other: Of the other forward.
            names: The adapters.
        """
        pairs = [(self.back(name), other.back(name)) for name in names]
        return all(one.shape == two.shape and bool((one == two).all()) for one, two in pairs)

    def later(self, name: str, seen: int, rows: int) -> Tensor:
        """`back` in another forward over the same text, shorter or longer by what was made since; (rows,).

        Args:
            name: The adapter.
            seen: Positions up to the end of that forward.
            rows: Its rows: each of these may stand there several times running (beams).
        """
        back = of_rows(self.back(name), rows)
        return back if self.seen is None else torch.where(back > 0, back + (seen - self.seen), 0).clamp_min(0)

    def of_rows(self, name: str, index: Tensor) -> Starts:
        """The same for some rows, those of one adapter; made once.

        Args:
            name: The adapter.
            index: Numbers of its rows, (rows of it,).
        """
        if name not in self._parts:
            find = partial(self._selected, index)
            self._parts[name] = Starts(find, self.length, self.seen, self.whole)
        return self._parts[name]

    def _selected(self, index: Tensor, name: str) -> Tensor:
        back = self.back(name)
        return back.index_select(0, index.to(back.device))

    def mask(self, name: str, z: Tensor) -> Tensor:
        """Where the adapter acts, true or false, shaped to multiply z.

        Args:
            name: The adapter.
            z: What it adds, (rows, positions, out), (rows · positions, out), or (rows, out) for the last position.

        Returns:
            (rows, positions, 1), (rows · positions, 1) or (rows, 1).

        Raises:
            RouteError: z has no such axes, so that the positions in it cannot be told.
        """
        back = self.back(name)
        rows = back.shape[0]
        flat = z.ndim == 2 and self.length is not None and z.shape[0] == rows * self.length
        fits = flat or (z.ndim in (2, 3) and z.shape[0] == rows)
        positions = self.length if flat else z.shape[1] if z.ndim == 3 else 1
        if not fits or positions is None or (self.whole and positions != self.length):
            raise RouteError(
                f"Adapter {name!r} acts from its invocation tokens on, and a site received {tuple(z.shape)} where the "
                f"batch has {rows} rows of {self.length or 'so many'} positions, so its positions are not known. Leave "
                "the module out of target_modules."
            )
        key = (name, positions, flat, z.device)
        if key not in self._masks:
            acts = torch.arange(positions, device=z.device) >= positions - back.to(z.device)[:, None]
            self._masks[key] = acts.reshape(-1, 1) if flat or z.ndim == 2 else acts[:, :, None]
        return self._masks[key]


def of_rows(numbers: Tensor, rows: int) -> Tensor:
    """Numbers of each row for a batch in which each row stands several times running, (rows,).

    Args:
        numbers: One per row, (n,).
        rows: Rows of the batch.

    Raises:
        RouteError: They are not a multiple.
    """
    if numbers.shape[0] == rows:
        return numbers
    if rows % numbers.shape[0]:
        raise RouteError(
            f"Where adapters begin was found for {numbers.shape[0]} rows, and the batch has {rows}. Give a batch, or a "
            "cache, with the same rows."
        )
    return numbers.repeat_interleave(rows // numbers.shape[0])


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
