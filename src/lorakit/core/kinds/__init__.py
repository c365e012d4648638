"""The table KINDS: for each type of module, how A and B act on it and what shape their product has."""

from __future__ import annotations

from torch import nn

from lorakit.core.kinds.convolution import CONV1, CONV2, CONV3
from lorakit.core.kinds.dense import CONV1D, EMBEDDING, LINEAR
from lorakit.core.kinds.kind import Kind, Shape, Slot, channel_axis, dense_delta, spread
from lorakit.core.kinds.parameter import ATTENTION, INNER, PARAMETER, parameter_slot, per_expert

__all__ = [
    "INNER",
    "KINDS",
    "PARAMETER",
    "READ_BY_THEIR_OWNER",
    "Kind",
    "Shape",
    "Slot",
    "channel_axis",
    "dense_delta",
    "kind_named",
    "kind_of",
    "parameter_slot",
    "per_expert",
    "spread",
]

KINDS: tuple[Kind, ...] = (LINEAR, CONV1D, EMBEDDING, CONV1, CONV2, CONV3, ATTENTION, PARAMETER, INNER)

_NAMED = {kind.name: kind for kind in KINDS}

READ_BY_THEIR_OWNER = frozenset({"torch.nn.modules.linear.NonDynamicallyQuantizableLinear"})
"""Dense layers whose weight another module reads without calling them: factors beside them would do nothing."""


def kind_of(module_type: type[nn.Module]) -> Kind | None:
    """The kind of site that a type of module can be, or None; the nearest ancestor in a row decides.

    Args:
        module_type: Class of a module of the base.
    """
    for ancestor in module_type.__mro__:
        dotted = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if dotted in READ_BY_THEIR_OWNER:
            return None
        for kind in KINDS:
            if ancestor in kind.types or dotted in kind.types:
                return kind
    return None


def kind_named(name: str) -> Kind:
    """The kind with that name; names are the table's own, so a miss is a mistake in lorakit."""
    return _NAMED[name]
