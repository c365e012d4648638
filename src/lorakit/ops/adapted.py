"""Operands of the fused operations (frozen linear modules with adapters), and fp32 buffers for upcasting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.ops.autograd import alias
from lorakit.ops.int8_weight import Int8Weight

SLAB = 1 << 18
"""Number of elements to upcast to fp32 at a time: small enough that the copy fits in the cache."""


def upcast_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and other intermediate results: float64 if `dtype` is float64, otherwise fp32."""
    return torch.promote_types(dtype, torch.float32)


def slabs(x: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of x (N, d): about SLAB elements each on a CPU, all rows at once on other devices."""
    many = max(_many(x), 1)
    yield from (slice(begin, begin + many) for begin in range(0, len(x), many))


def scratch_like(x: Tensor) -> Tensor:
    """Return an uninitialized buffer (rows, d), in fp32 or wider, for one slab of x (N, d)."""
    return x.new_empty(_many(x), x.shape[1], dtype=upcast_dtype(x.dtype))


def upcast_scratch(x: Tensor) -> Tensor | None:
    """Return a `scratch_like` buffer (rows, d) for upcasting x (N, d), or None if x is already fp32 or wider."""
    return None if x.dtype == upcast_dtype(x.dtype) else scratch_like(x)


def _many(x: Tensor) -> int:
    return min(max(SLAB // max(x.shape[1], 1), 1), len(x)) if x.device.type == "cpu" else len(x)


@dataclass(frozen=True, eq=False)
class LowRank:
    """An adapter: its LoRA factors A (r, in) and B (out, r), scale, and current dropout probability p in [0, 1)."""

    A: Tensor
    B: Tensor
    scale: float
    p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"adapter dropout must be in [0, 1); got {self.p}")


@dataclass(frozen=True, eq=False)
class Adapted:
    """A frozen linear module with an optional adapter: W is (out, in), or (in, out) if transposed; bias is (out,)."""

    W: Tensor | Int8Weight
    bias: Tensor | None = None
    low: LowRank | None = None
    transposed: bool = False

    @property
    def in_features(self) -> int:
        """Return the input width."""
        return self.W.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """Return the output width."""
        return self.W.shape[1 if self.transposed else 0]


def check_frozen(group: Sequence[Adapted]) -> None:
    """Check that all weights are frozen, because the fused operations compute no gradients for them.

    Raises:
        ValueError: A weight or bias requires a gradient.
    """
    for module in group:
        for name, tensor in (("weight", module.W), ("bias", module.bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"a {name} of shape {tuple(tensor.shape)} requires a gradient, which the fused operations do not "
                    "compute; freeze it or call the module directly"
                )


def factors(group: Sequence[Adapted]) -> list[Tensor | None]:
    """Return A_0, B_0, A_1, B_1, … as inputs to an autograd function, with None for modules without an adapter."""
    return [t for module in group for t in ((module.low.A, module.low.B) if module.low else (None, None))]


def aliased(group: Sequence[Adapted]) -> tuple[list[Adapted], list[Tensor | None]]:
    """Return modules with aliases of their factors, and these factors in the order of `factors`; for a replay."""
    sites = [
        one if one.low is None else replace(one, low=replace(one.low, A=alias(one.low.A), B=alias(one.low.B)))
        for one in group
    ]
    return sites, factors(sites)
