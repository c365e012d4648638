"""Streaming statistics of one site: moments of its inputs, whole or as a sketch, and the mean gradient of its weight.

They only add up rows and gradients; where these come from is in `collecting`. Knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.quantization import at_least_fp32
from lorakit.errors import DataError


@dataclass(frozen=True)
class Principal:
    """The strongest directions of a site's inputs.

    Attributes:
        vectors: Orthonormal directions, strongest first, (k, in); the largest number of each is positive.
        values: Singular values of the (centred) rows along them, (k,).
        ratios: Share of the whole variance that each explains, (k,).
    """

    vectors: Tensor
    values: Tensor
    ratios: Tensor


class InputStatistics:
    """Moments of the rows x (in,) that a site received.

    Attributes:
        components: None where the whole second moment is kept, else how many directions are.
        rows: How many rows were counted.
        calls: How often rows came.
        total: Σ x, (in,); None before the first row.
        gram: Σ x·xᵀ, (in, in); None before the first row, and always where `components` is given.
    """

    def __init__(self, components: int | None = None) -> None:
        self.components = components
        self.rows = self.calls = 0
        self.total: Tensor | None = None
        self.gram: Tensor | None = None
        self._sketch: Tensor | None = None  # (≤ components, in): singular values times directions, centred
        self._squares = 0.0  # Σ of squares of all numbers

    def add(self, rows: Tensor) -> None:
        """Count rows.

        Args:
            rows: (n, in), of any floating dtype.
        """
        if not len(rows):
            return
        rows = at_least_fp32(rows.detach())
        if self.components is None:
            self._add(1, len(rows), rows.sum(0), float(rows.square().sum(dtype=torch.float64)))
            product = rows.T @ rows
            self.gram = product if self.gram is None else self.gram.add_(product)
            return
        stacked = [rows - rows.mean(0)]
        if self._sketch is not None and self.total is not None:  # Ross et al. 2008, section 2.1.2
            shift = (self.rows * len(rows) / (self.rows + len(rows))) ** 0.5 * (self.total / self.rows - rows.mean(0))
            stacked = [self._sketch, *stacked, shift[None]]
        _, values, vectors = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
        self._sketch = values[: self.components, None] * vectors[: self.components]
        self._add(1, len(rows), rows.sum(0), float(rows.square().sum(dtype=torch.float64)))

    def merge(self, other: InputStatistics) -> None:
        """Count what another has counted; both keep whole second moments.

        Args:
            other: Statistics of rows of the same width; not changed.
        """
        if other.total is None or other.gram is None:
            return
        self._add(other.calls, other.rows, other.total, other._squares)
        self.gram = other.gram.clone() if self.gram is None else self.gram.add_(other.gram)

    def _add(self, calls: int, rows: int, total: Tensor, squares: float) -> None:
        self.calls += calls
        self.rows += rows
        self._squares += squares
        self.total = total.clone() if self.total is None else self.total.add_(total)

    def second_moment(self) -> Tensor:
        """Σ x·xᵀ / rows, (in, in), not centred: what CorDA calls the covariance.

        Raises:
            DataError: No row was counted, or only a sketch was kept.
        """
        if self.gram is None:
            raise DataError("The second moment was not kept: no row was counted, or `components` was given.")
        return self.gram / self.rows

    def principal(self, k: int) -> Principal:
        """The strongest directions around the mean, as PCA has them.

        Args:
            k: At most so many; fewer where there are fewer.

        Returns:
            Directions, singular values and shares of the variance, in fp32.

        Raises:
            DataError: No row was counted.

        Source:
            Whole: eigenvectors of the centred second moment. Sketch: Ross et al. 2008, doi:10.1007/s11263-007-0075-7.
        """
        if self.total is None:
            raise DataError("No batch reached this site, so its inputs have no directions.")
        device = self.total.device
        work = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        mean = self.total.to(work, torch.float64) / self.rows
        variance = max(self._squares - self.rows * float(mean @ mean), 0.0)
        if self.gram is not None:
            centred = self.gram.to(work, torch.float64) - self.rows * torch.outer(mean, mean)
            squared, columns = torch.linalg.eigh(centred)
            squared, vectors = squared.flip(0)[:k].clamp_min(0), columns.flip(1).T[:k]
            values = squared.sqrt()
        else:
            sketch = self._sketch.to(work, torch.float64)  # type: ignore[union-attr]  # a row was counted
            values = sketch.norm(dim=1)[:k]
            vectors = sketch[:k] / values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        ratios = values.square() / variance if variance > 0 else torch.zeros_like(values)
        return Principal(*(part.to(device, torch.float32) for part in (vectors, values, ratios)))


class GradientStatistics:
    """The gradient of the loss by a site's weight, added up.

    Attributes:
        batches: Batches that were run.
        calls: How often a gradient came; a module that is called twice in a forward gets two.
        total: Sum of the gradients, canonical (out, in) or (out, in / groups, k…); None before the first.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.calls = 0
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Count a gradient.

        Args:
            gradient: Canonical, (out, in) or (out, in / groups, k…), fp32 or wider; it is kept, not copied.
        """
        self.calls += 1
        self.total = gradient if self.total is None else self.total.add_(gradient)

    def mean(self) -> Tensor:
        """The gradient of the mean of the batches' losses, canonical (out, in) or (out, in / groups, k…).

        Raises:
            DataError: No loss depended on this site.
        """
        if self.total is None:
            raise DataError("No loss depended on this site, so its weight has no gradient.")
        return self.total / self.batches
