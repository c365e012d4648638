"""fp32 images of narrow tensors: the dtype that is wide enough for a sum, and few rows at a time.

Frozen linear modules and the adapters beside them: the operands of the fused operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB = 1 << 18
"""Numbers that are widened to fp32 at a time: their images stay near the cache and take little memory."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a dtype are summed and rounded from: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def slabs(x: Tensor) -> Iterator[slice]:
    """Rows of x (N, d) that are worked on at a time: about SLAB numbers on a CPU, all of them elsewhere."""
    many = max(_many(x), 1)
    yield from (slice(begin, begin + many) for begin in range(0, len(x), many))


def room(x: Tensor) -> Tensor:
    """Scratch in the wide dtype for one slab of x (N, d), (rows, d)."""
    return x.new_empty(_many(x), x.shape[1], dtype=wide(x.dtype))


def room_to_widen(x: Tensor) -> Tensor | None:
    """The same (rows, d), or None where x (N, d) is wide already and needs no image."""
    return None if x.dtype == wide(x.dtype) else room(x)


def _many(x: Tensor) -> int:
    return min(max(SLAB // max(x.shape[1], 1), 1), len(x)) if x.device.type == "cpu" else len(x)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Factors of one adapter: A (r, in), B (out, r), the scale, and the dropout of its input that is in force now.

    Raises:
        ValueError: The dropout leaves nothing.
    """

    A: Tensor
    B: Tensor
    scale: float
    p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"the dropout beside a frozen module is at least 0 and below 1; got {self.p}")


@dataclass(frozen=True, eq=False)
class Adapted:
    """A frozen linear module and what is beside it: W (out, in), or (in, out) where transposed; bias (out,)."""

    W: Tensor
    bias: Tensor | None = None
    low: LowRank | None = None
    transposed: bool = False


def refuse_trained(group: Sequence[Adapted]) -> None:
    """Refuse weights that are trained: the fused operations make no gradient for them.

    Raises:
        ValueError: A weight or bias asks for a gradient.
    """
    for module in group:
        for name, tensor in (("weight", module.W), ("bias", module.bias)):
            if tensor is not None and tensor.requires_grad:
                shape = tuple(tensor.shape)
                raise ValueError(
                    f"a {name} of shape {shape} asks for a gradient, and the fused operations make none for the base; "
                    f"freeze it, or run the module itself"
                )


def factors(group: Sequence[Adapted]) -> list[Tensor | None]:
    """A_0, B_0, A_1, B_1, …: the trained inputs of a function over the group, None where a module has no adapter."""
    return [t for module in group for t in ((module.low.A, module.low.B) if module.low else (None, None))]


def rows(x: Tensor) -> Tensor:
    """Contiguous rows (N, in) of x (…, in); a view where it can be."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def unflat(y: Tensor, like: Tensor) -> Tensor:
    """Rows y (N, out) in the leading dimensions of `like` (…, in)."""
    return y.view(*like.shape[:-1], y.shape[-1])


def autocast(x: Tensor) -> Tensor:
    """The tensor (any shape) in autocast's dtype, where that is on; double precision stays, as autocast leaves it."""
    device = x.device.type
    on = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if on else x


def casts(x: Tensor) -> bool:
    """Whether autocast is on and has another dtype than x (any shape): else all of a block is in one dtype anyway."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device)


def as_written(x: Tensor) -> AbstractContextManager[object]:
    """A block in which no product is cast by autocast, on the device of x (any shape): the operation has seen to it."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
