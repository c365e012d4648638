"""The maximum sequence length that follows the data, if none is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorakit import plan
from lorakit.config import LoraConfig
from lorakit.data import AnyRecords, Document, Tokenizer
from lorakit.machine import this_machine
from lorakit.plan.fitting import needed_bytes
from lorakit.tasks import EncodeOptions, TaskOnData
from lorakit.train.defaults import ASSUMED_LENGTH, SHORTEST_LENGTH

if TYPE_CHECKING:
    from lorakit.train.settings import TrainSettings

PERCENTILE = 99
"""Percentile of the lengths of rows that becomes the maximum length."""

SAMPLED_ROWS = 500
"""Number of rows whose lengths are measured, at equal distances, if there are more."""

_WHOLE = 1 << 30


def usual_length(records: AnyRecords, tokenizer: Tokenizer, task: TaskOnData) -> int:
    """Return the percentile `PERCENTILE` of the lengths of rows in tokens; documents, which are split, have no length.

    Args:
        records: The training records; of a stream, those of the first part.
        tokenizer: The tokenizer that encodes them.
        task: The task, and what it predicts.

    Returns:
        The length of one of the rows, at least `SHORTEST_LENGTH`; with documents, at least `ASSUMED_LENGTH`.

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


def fitting_length(length: int, shape: plan.ModelShape, config: LoraConfig, settings: TrainSettings) -> int:
    """Return a length whose planned memory fits: halved as often as needed, but not below `ASSUMED_LENGTH`.

    Args:
        length: The wanted length in tokens.
        shape: The model's shape.
        config: The adapter's config.
        settings: The run's settings; a limit of memory selects the smallest batch and the most recomputation.
    """
    given = settings.fit or settings.memory_budget
    limit = plan.bytes_of(given) if given else _memory_bytes(settings.device)
    while limit is not None and length > ASSUMED_LENGTH:
        job = plan.Job(
            batch_rows=1 if settings.fit else settings.per_device_train_batch_size,
            length_tokens=length,
            dtype=shape.dtype if settings.dtype == "auto" else settings.dtype,
            recompute="layers" if given else settings.recomputed,
            optimizer=settings.optimizer,
            quantization=settings.quantization,
            double_quantization=settings.double_quantization,
            base_matmul="dtype" if settings.quantization else settings.base_matmul,
            accelerated=settings.accelerate,
        )
        if needed_bytes(plan.estimate(shape, config, job, allow_partial=settings.allow_partial_targets)) <= limit:
            break
        length = max(ASSUMED_LENGTH, length // 2)
    return length


def _memory_bytes(device: str) -> int | None:
    """Return the memory of the device that the setting selects, in bytes; None if it is not known."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return this_machine().memory_bytes if device in ("auto", "cpu") else None
