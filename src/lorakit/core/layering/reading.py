"""The weight that a site's adapters see, read once in a forward however many of them ask.

Reading a quantised weight multiplies it out whole. Nothing is kept beyond the forward: a weight can be written in ways
that leave no trace (`.data`), and a norm of another weight would be wrong in silence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Weights = dict["str | None", Tensor]
"""What was read in one forward of one site: the adapter that moved the base, or None, -> weight."""


def read_once(layer: Any, name: str, found: Weights) -> Tensor:
    """The canonical weight (out, in) as an adapter sees it: one whose init moved the base has a base of its own.

    Args:
        layer: The site's `LoraLayer`.
        name: The adapter.
        found: What was read in this forward, which is added to.
    """
    own = name if name == layer.moved_by else None
    if own not in found:
        found[own] = layer.read(own)
    return found[own]
