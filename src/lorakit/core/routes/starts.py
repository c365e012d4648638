"""Where adapters that wait for their invocation tokens (aLoRA) begin in the rows of a forward.

Counted from the end of what a row holds, so that a site which sees only the last positions needs no more. All of it is
computed on the tokens' own device, once per forward and adapter; no layer looks at tokens. It knows nothing of
adapters' configs, of the route, or of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import RouteError


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
