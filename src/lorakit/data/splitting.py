"""Holds out a share of the records for evaluation, by document, decided by a seed and the content alone.

Equal records stay on one side, so that nothing that is trained on is also evaluated on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.records import Document, Record, Records, content_key, keys_of
from lorakit.data.stored import AnyRecords, StoredRecords
from lorakit.errors import ConfigError

DEFAULT_FRACTION = 0.05
"""Share of the documents that is held out where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Split:
    """Records to train on and records to evaluate on.

    Attributes:
        train: What is trained on, in the order given; carries the notes of the input.
        held_out: What is evaluated on, in the order given; may be empty.
        note: A sentence to print on what was held out, or why nothing was.
    """

    train: AnyRecords
    held_out: AnyRecords
    note: str


def split(records: Iterable[Record], fraction: float = DEFAULT_FRACTION, seed: int = 0) -> Split:
    """Hold out a share of the documents, whole ones, at least one where there are two.

    Which ones depends on the seed and on what the records say, not on their order, and hardly on the others:
    records that are added later leave most of the choice as it was.

    Args:
        records: All records.
        fraction: Share of the distinct documents to hold out, in [0, 1).
        seed: Another seed, another choice.

    Returns:
        Both sides and a sentence.

    Raises:
        ConfigError: The fraction is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"eval_fraction is {fraction}; a share in [0, 1) is needed, such as {DEFAULT_FRACTION}.")
    everything = records if isinstance(records, StoredRecords | Records) else Records(records)
    notes = everything.notes
    if fraction == 0:
        return Split(everything, Records(), "Nothing is held out for evaluation (eval_fraction is 0).")
    digests = keys_of(b"".join(content_key(record, salt=str(seed)) for record in everything))
    distinct = np.unique(digests)
    if len(distinct) < 2:
        note = (
            f"Nothing is held out for evaluation: the data is a single {_noun(everything, 1)}, which is not cut for "
            "it. Give --eval-data to measure on other text."
        )
        return Split(everything, Records(), note)
    count = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    chosen = digests <= distinct[count - 1]  # the first ones
    train = _some(everything, np.flatnonzero(~chosen), notes)
    held_out = _some(everything, np.flatnonzero(chosen))
    verb = "is" if len(held_out) == 1 else "are"
    total = f"{len(everything):,} {_noun(everything, len(everything))}"
    note = f"{len(held_out):,} of {total} {verb} held out for evaluation (seed {seed})."
    return Split(train, held_out, note)


def _some(records: AnyRecords, positions: np.ndarray[Any, Any], notes: Iterable[str] = ()) -> AnyRecords:
    if isinstance(records, StoredRecords):
        return records.some(positions, notes)
    return Records((records[at] for at in positions), notes)


def _noun(records: AnyRecords, count: int) -> str:
    word = "document" if all(isinstance(record, Document) for record in records) else "row"
    return word if count == 1 else f"{word}s"
