"""Size of the optimizer state, which depends on the optimizer and, for some optimizers, on the shape of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.choices import EMBEDDING
from lorakit.plan.job import MASTER_BYTES

if TYPE_CHECKING:
    from lorakit.plan.params import Count, SiteCount

SMALLEST_8BIT = 4096
"""Number of elements from which bitsandbytes uses 8-bit state for a tensor; below, the state is fp32."""

BLOCK_8BIT = 256
"""Number of elements that share a scale in an 8-bit state."""

_CODE_TABLES = 2 * 256 * 4  # the two tables of 8-bit values, which all tensors share


@dataclass(frozen=True)
class TrainedTensor:
    """A trained tensor; `is_matrix` says whether it is the A or B of one weight, which Muon orthogonalizes."""

    elements: int
    itemsize: int
    is_matrix: bool = False


def optimizer_state(counted: Count, optimizer: str, itemsize: int) -> tuple[str, int]:
    """Return the formula and the size in bytes of the optimizer state. [docs/math.md (23)]

    `itemsize` is that of saved modules and of trained biases of the base, which have the base's dtype.
    """
    return OPTIMIZERS[optimizer].state(list(_tensors(counted, itemsize)))


def _tensors(counted: Count, itemsize: int) -> Iterator[TrainedTensor]:
    """Yield the trained tensors; a saved module, and all trained biases together, count as one tensor each."""
    for site in counted.sites:
        yield from _factors(site)
    for elements in counted.rows.values():
        yield TrainedTensor(elements, MASTER_BYTES)
    for elements in (*counted.saved.values(), counted.biases):
        yield TrainedTensor(elements, itemsize)


def _factors(site: SiteCount) -> Iterator[TrainedTensor]:
    """Yield the trained factors of a site, the variant's own tensors as one tensor, and the bias of B."""
    is_matrix = site.kind != EMBEDDING and site.experts == 1
    for name, features in (("A", site.in_features), ("B", site.out_features)):
        if name not in site.frozen_factors:
            missing = min(0, site.own_numbers) if name == site.smaller_factor else 0
            yield TrainedTensor(site.experts * site.rank * features + missing, MASTER_BYTES, is_matrix)
    yield TrainedTensor(max(0, site.own_numbers), MASTER_BYTES)
    yield TrainedTensor(site.bias, MASTER_BYTES)


def _moments(tensors: Sequence[TrainedTensor]) -> tuple[str, int]:
    """Return the formula and the size of two values per element, in the dtype of each tensor."""
    master = sum(tensor.elements for tensor in tensors if tensor.itemsize == MASTER_BYTES)
    others = {tensor.itemsize for tensor in tensors if tensor.elements} - {MASTER_BYTES}
    parts = [f"4 × {master:,}"]
    for itemsize in sorted(others):
        parts.append(f"{itemsize} × {sum(t.elements for t in tensors if t.itemsize == itemsize):,}")
    return f"2 × ({' + '.join(parts)})", 2 * sum(tensor.elements * tensor.itemsize for tensor in tensors)


def _eight_bit(tensors: Sequence[TrainedTensor]) -> tuple[str, int]:
    """Return the formula and the size of two bytes per element with a scale per block, or of two fp32 values."""
    large = [tensor.elements for tensor in tensors if tensor.elements >= SMALLEST_8BIT]
    small = sum(tensor.elements for tensor in tensors if tensor.elements < SMALLEST_8BIT)
    blocks = sum(-(-elements // BLOCK_8BIT) for elements in large)
    size = 2 * (sum(large) + 4 * blocks + 4 * small) + (_CODE_TABLES if large else 0)
    tables = f" + {_CODE_TABLES:,}" if large else ""
    return f"2 × ({sum(large):,} + 4 × {blocks:,} blocks + 4 × {small:,}){tables}", size


def _muon(tensors: Sequence[TrainedTensor]) -> tuple[str, int]:
    """Return the formula and the size of one value per element of a matrix, and two per element of other tensors."""
    matrices = sum(tensor.elements for tensor in tensors if tensor.is_matrix)
    others = [tensor for tensor in tensors if not tensor.is_matrix and tensor.elements]
    formula, size = _moments(others) if others else ("", 0)
    return f"4 × {matrices:,}" + (f" + {formula}" if formula else ""), MASTER_BYTES * matrices + size


@dataclass(frozen=True)
class OptimizerCosts:
    """Values that an optimizer stores for trained tensors (formula, bytes), and whether it freezes a factor.

    The frozen factor of each site is the one that is not initialized to zero.
    """

    state: Callable[[Sequence[TrainedTensor]], tuple[str, int]]
    freezes_factor: bool = False


OPTIMIZERS: dict[str, OptimizerCosts] = {
    "adamw": OptimizerCosts(_moments),
    "adamw8bit": OptimizerCosts(_eight_bit),
    "lorafa": OptimizerCosts(_moments, freezes_factor=True),
    "muon": OptimizerCosts(_muon),
}
"""Name of an optimizer -> its costs; LoRA-FA and Muon (for A and B) train all other tensors with AdamW."""
