"""The maximum sequence length of data that is evaluated or predicted, or trained on, if none is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lorakit import plan
from lorakit.data import AnyRecords, Document, Tokenizer
from lorakit.errors import UsageError
from lorakit.plan.job import ASSUMED_LENGTH
from lorakit.tasks import EncodeOptions, TaskOnData

SHORTEST_LENGTH = 16
"""Shortest maximum length that follows the data, in tokens."""

PERCENTILE = 99
"""Percentile of the lengths of rows that becomes the maximum length."""

SAMPLED_ROWS = 500
"""Number of rows whose lengths are measured, at equal distances, if there are more."""

_WHOLE = 1 << 30


def usual_length(records: AnyRecords, tokenizer: Tokenizer, task: TaskOnData) -> int:
    """Return the percentile `PERCENTILE` of the lengths of rows in tokens; documents, which are split, have no length.

    The result is at least `SHORTEST_LENGTH`, and with documents at least `ASSUMED_LENGTH`.

    Raises:
        DataError: A row cannot be encoded.
    """
    least, options, found = SHORTEST_LENGTH, EncodeOptions(_WHOLE, is_labeled=False), list[int]()
    for at in range(0, len(records), max(1, -(-len(records) // SAMPLED_ROWS))):
        record = records[at]
        if isinstance(record, Document):
            least = ASSUMED_LENGTH
        else:
            found += [len(row) for row in task.task.encode_one(record, tokenizer, task.target, options)]
    return max(least, percentile(found) if found else ASSUMED_LENGTH)


def percentile(sizes: Sequence[int]) -> int:
    """Return the smallest of the lengths that at least `PERCENTILE` percent of them do not exceed."""
    return int(np.percentile(np.asarray(sizes), PERCENTILE, method="inverted_cdf"))


def max_length_for(shape: plan.ModelShape, wanted: int | None, usual: Callable[[], int]) -> int:
    """Return the given maximum sequence length, or else the usual one, reduced to the model's limit.

    Raises:
        UsageError: The given length exceeds the model's limit.
    """
    if wanted is None:
        by_data = usual()
        return min(by_data, shape.positions or by_data)
    if 0 < shape.positions < wanted:
        raise UsageError(
            f"max_length is {wanted:,}, but {shape.name} supports at most {shape.positions:,} tokens; "
            f"pass --max-length {shape.positions} or less.",
            what=wanted,
            field="max_length",
            allowed=(str(shape.positions),),
        )
    return wanted
