"""Differences of two evaluations of the same documents: interval, verdict, and what the documents could show at all.

The documents are a sample, and the interval is about all documents like them. It comes from the values without each
document (the jackknife), which pairs the evaluations and holds for any metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from lorakit.durable import JsonObject
from lorakit.tables import format_count

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Verdict = Literal["better", "worse", "undecided", "unknown"]

LEAST_DOCUMENTS, LEAST_FREEDOM = 20, 6.0
"""Number of documents, and of degrees of freedom, below which an interval would not cover what it promises."""

CONFIDENCE, POWER = 0.95, 0.8
"""Confidence of intervals, and the power with which `Difference.detectable` would be found."""

_MOST_PARTS = 100
"""Number of parts into which more documents are divided, if each value without a part is expensive to compute."""


@dataclass(frozen=True)
class Difference:
    """A value of one evaluation minus that of another one of the same documents.

    Attributes:
        value: The difference.
        error: Its standard error; 0 if no document shows one.
        freedom: Degrees of freedom of the error.
        documents: Number of documents, or of groups of documents.
        better: Fraction of the documents whose own value is better, or None if they have none.
        is_loss: Whether a smaller value is better.
    """

    value: float
    error: float
    freedom: float
    documents: int
    better: float | None = None
    is_loss: bool = True

    @property
    def is_reliable(self) -> bool:
        """True if there are enough documents for an interval."""
        return self.documents >= LEAST_DOCUMENTS and self.freedom >= LEAST_FREEDOM

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the interval with the confidence `CONFIDENCE`; None if there are not enough documents."""
        if not self.is_reliable:
            return None
        margin = self.error * _quantile(self.freedom, (1 + CONFIDENCE) / 2)
        return self.value - margin, self.value + margin

    @property
    def detectable(self) -> float | None:
        """Smallest difference that as many such documents show with the power `POWER`, or None."""
        if not self.is_reliable:
            return None
        return self.error * (_quantile(self.freedom, (1 + CONFIDENCE) / 2) + _quantile(self.freedom, POWER))

    @property
    def verdict(self) -> Verdict:
        """The meaning of the interval: "undecided" if it contains 0, "unknown" if there is none."""
        if self.interval is None:
            return "unknown"
        low, high = self.interval
        if low <= 0 <= high:
            return "undecided"
        return "better" if (high < 0) == self.is_loss else "worse"

    def as_dict(self) -> JsonObject:
        """Return the numbers for JSON."""
        return {
            "difference": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "documents": self.documents,
            "better": self.better,
            "detectable": self.detectable,
            "verdict": self.verdict,
        }

    def sentence(self, quantity: str, unit: str = "document") -> str:
        """Return the verdict on a quantity, such as "loss", with its numbers; `unit` is the noun for one document."""
        counted = format_count(self.documents, unit)
        change = f"{quantity} {_signed(self.value)}"
        if self.interval is None:
            return (
                f"no verdict ({change}): {counted} {'is' if self.documents == 1 else 'are'} too few or too unequal "
                f"for an interval, which needs at least {LEAST_DOCUMENTS}."
            )
        low, high = map(_signed, self.interval)
        share = "" if self.better is None else f", {self.better:.0%} of them better"
        numbers = f"{change}, {CONFIDENCE:.0%} interval {low} to {high}; {counted}{share}"
        if self.verdict != "undecided":
            return f"{self.verdict} ({numbers})."
        least = f"the smallest that they show with {POWER:.0%} power is {self.detectable:.2g}"
        return f"no difference that {counted} can show ({numbers}); {least}."


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:+.2g}"


def _quantile(freedom: float, probability: float) -> float:
    """Return a quantile of Student's t distribution."""
    from scipy.special import stdtrit  # takes longer to import than everything else here

    return float(stdtrit(freedom, probability))


def mean_difference(
    first: Sequence[float] | Array,
    second: Sequence[float] | Array,
    weights: Sequence[int] | Array,
    *,
    is_loss: bool = True,
) -> Difference:
    """Return the difference of two means over the targets of documents, such as of losses per token.

    `first` and `second` are the sums of each document, and `weights` its numbers of targets.
    """
    sums, counts = np.asarray(first, float) - np.asarray(second, float), np.asarray(weights, float)
    kept = counts > 0
    sums, counts = sums[kept], counts[kept]
    value = math.fsum(sums) / math.fsum(counts)
    better = float(np.mean(sums < 0 if is_loss else sums > 0))
    if len(counts) < 2:
        return Difference(value, 0.0, 0.0, len(counts), better, is_loss)
    without = (sums.sum() - sums) / (counts.sum() - counts)
    return Difference(value, *_jackknife(without, counts), len(counts), better, is_loss)


def metric_differences(
    first: Callable[[Array], Sequence[float]],
    second: Callable[[Array], Sequence[float]],
    documents: Sequence[int] | Array,
    losses: Sequence[bool],
) -> list[Difference]:
    """Return the differences of metrics, given functions that compute all of them over some rows.

    `documents` has the number of each row's document; the functions get the indices of the rows, shape (rows,), and
    return NaN for metrics that these rows do not define. `losses` says of each metric whether a smaller value is
    better.
    """
    numbers, document_of = np.unique(np.asarray(documents), return_inverse=True)
    parts = min(len(numbers), _MOST_PARTS)

    def changes(rows: Array) -> Array:
        return np.asarray(first(rows), float) - np.asarray(second(rows), float)

    values = changes(np.arange(len(document_of)))
    if parts < 2:
        return [
            Difference(float(one), 0.0, 0.0, len(numbers), None, is_loss)
            for one, is_loss in zip(values, losses, strict=True)
        ]
    part_of = document_of * parts // len(numbers)
    without = np.stack([changes(np.flatnonzero(part_of != part)) for part in range(parts)])
    sizes = np.bincount(part_of, minlength=parts).astype(float)
    return [
        Difference(float(one), *_jackknife(column, sizes), len(numbers), None, is_loss)
        for one, column, is_loss in zip(values, without.T, losses, strict=True)
    ]


def _jackknife(without: Array, sizes: Array) -> tuple[float, float]:
    """Return the standard error and its degrees of freedom.   [docs/math.md (114)]

    The values without each document, and the sizes of the documents, have the shape (documents,).

    Documents of unequal size, and differences with long tails, leave fewer degrees of freedom than documents; values
    that are not finite leave none.
    """
    n = len(without)
    if not np.isfinite(without).all():
        return 0.0, 0.0
    deviations = without - without.mean()
    squares = float((deviations**2).sum())
    if squares <= n * (np.finfo(float).eps * np.abs(without).max()) ** 2:
        return 0.0, n - 1.0
    by_tails = 3 * squares**2 / float((deviations**4).sum()) - 1
    by_sizes = float(sizes.sum() ** 2 / (sizes**2).sum()) - 1
    return math.sqrt((n - 1) / n * squares), max(0.0, min(n - 1.0, by_tails, by_sizes))
