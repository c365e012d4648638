"""What a row of the table VARIANTS says, and what it is given in a forward.

Every variant returns an *addition* to the base output and to the base weight, so that several adapters, and
batches whose rows use different ones, are well defined whatever their order. A row sees tensors and the kind's
geometry; it knows nothing about adapters' names, routes or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lorakit.core.factor import Factor
from lorakit.core.kinds import Kind, Slot


@dataclass(frozen=True)
class At:
    """One factor in one forward.

    Attributes:
        y0: The base's output, (…, out); of a convolution (N, out, …).
        bias: The bias in it, (out,), or None.
        z: The scaled low-rank output s·B(A x), like y0.
        factor: The factor.
        kind: The kind of the site.
        slot: Its geometry.
        read: Reads the canonical base weight, (out, in) or as the kind says.
        acts: z -> where the adapter acts, shaped to multiply it, for variants that wait for an invocation; None
            where that is not known.
    """

    y0: Tensor
    bias: Tensor | None
    z: Tensor
    factor: Factor
    kind: Kind
    slot: Slot
    read: Callable[[], Tensor]
    acts: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Variant:
    """One way to combine.

    Attributes:
        name: What messages call it.
        kinds: Names of the kinds it works on.
        mergeable: Its effect can be written into the weight.
        has_magnitude: It learns a vector of its own.
        magnitude: Kind, slot, canonical W, A, B, scale -> the vector it begins with, (out,).
        output: Where it is in a forward -> addition to y₀, like y₀.
        update: Kind, slot, canonical W, scaled delta like W, factor -> addition to W.
    """

    name: str
    kinds: tuple[str, ...]
    mergeable: bool
    has_magnitude: bool
    magnitude: Callable[[Kind, Slot, Tensor, Tensor, Tensor, float], Tensor]
    output: Callable[[At], Tensor]
    update: Callable[[Kind, Slot, Tensor, Tensor, Factor], Tensor]


def no_magnitude(kind: Kind, slot: Slot, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The vector that acts as none: ones, (out,); W (out, in), A (r, in), B (out, r) are not looked at."""
    return W.new_ones(slot.out_features)
