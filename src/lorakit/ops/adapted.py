"""Frozen linear modules with adapters, as operands of fused operations, and fp32 scratch for low-precision tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB = 1 << 18
"""Elements upcast to fp32 at a time, so that the copy fits the cache and takes little memory."""


def upcast_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and rounding: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def slabs(x: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of x (N, d): about SLAB elements each on a CPU, all rows elsewhere."""
    many = max(_many(x), 1)
    yield from (slice(begin, begin + many) for begin in range(0, len(x), many))


def scratch_like(x: Tensor) -> Tensor:
    """Return scratch (rows, d) in fp32 or wider for one slab of x (N, d)."""
    return x.new_empty(_many(x), x.shape[1], dtype=upcast_dtype(x.dtype))


def upcast_scratch(x: Tensor) -> Tensor | None:
    """Return the scratch (rows, d) of `scratch_like`, or None if x (N, d) is already fp32 or wider."""
    return None if x.dtype == upcast_dtype(x.dtype) else scratch_like(x)


def _many(x: Tensor) -> int:
    return min(max(SLAB // max(x.shape[1], 1), 1), len(x)) if x.device.type == "cpu" else len(x)


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA factors of one adapter: A (r, in), B (out, r), scale, and the current input dropout.

    Raises:
        ValueError: The dropout is not in [0, 1).
    """

    A: Tensor
    B: Tensor
    scale: float
    p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"adapter dropout must be in [0, 1); got {self.p}")


@dataclass(frozen=True, eq=False)
class Adapted:
    """Frozen linear module with an optional adapter: W (out, in), or (in, out) if transposed; bias (out,)."""

    W: Tensor
    bias: Tensor | None = None
    low: LowRank | None = None
    transposed: bool = False


def check_frozen(group: Sequence[Adapted]) -> None:
    """Check that all weights are frozen: the fused operations compute no gradient for them.

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
    """Return A_0, B_0, A_1, B_1, …: the trained inputs of a function over the group; None without adapter."""
    return [t for module in group for t in ((module.low.A, module.low.B) if module.low else (None, None))]
