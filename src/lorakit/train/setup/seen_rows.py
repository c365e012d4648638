"""Rows that an adapter was trained on, among rows to evaluate it on.

The split of a run is not stored: it is made again from the run's record, as for `--resume`, if the data is still there.
Otherwise, only whole files can be recognized, by their SHA-256. This module does not depend on models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit import data
from lorakit.data.records import content_key
from lorakit.errors import LorakitError
from lorakit.tables import format_count
from lorakit.train.files import run_folder
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.run_data import is_streamed, read_data

MOST_BYTES = 1 << 28
"""Maximum size of training data that is read again to compare rows."""


def seen_note(
    adapter: Path, facts: Mapping[str, Any], records: data.StoredRecords, *, by_file: bool = True
) -> str | None:
    """Return a message about rows that an adapter was trained on, or None if there are none or nothing is known.

    Args:
        adapter: The adapter's directory: `adapter/` or a checkpoint of a run, or a copy.
        facts: Contents of its `lorakit.json`.
        records: The rows to evaluate on.
        by_file: Whether they are all rows of their files, so that data of its run is a reason to doubt.
    """
    training = facts.get("training")
    hashes = training.get("data_sha256") if isinstance(training, Mapping) else None
    if not isinstance(hashes, Mapping) or not hashes:
        return None
    parts = _split_of(adapter.parent, hashes)
    if parts is None:
        same = [path for path, digest in records.digests().items() if by_file and digest in hashes.values()]
        return (
            f"{adapter}: {same[0]} was data of its training run (for training or evaluation); rows that it was trained "
            "on say little about new data."
            if same
            else None
        )
    trained = {content_key(record) for record in parts.training_records()}
    seen = sum(content_key(record) in trained for record in records)
    if seen:
        total = format_count(len(records), "row")
        return f"{adapter}: trained on {seen:,} of these {total}, which say little about new data."
    if not by_file:
        return None
    texts = {record.source for record in parts.train if isinstance(record, data.Document)}
    part = [path for path, digest in records.digests().items() if path in texts and digest in hashes.values()]
    return f"{adapter}: trained on a part of {part[0]}, which says little about new data." if part else None


def _split_of(run: Path, hashes: Mapping[str, Any]) -> data.Split | None:
    """Return the training and evaluation rows of a run, or None if they cannot be read again or have changed."""
    with contextlib.suppress(LorakitError, OSError):
        record = run_folder.read_record(run)
        if record is None or record.get("data_sha256") != hashes:
            return None
        settings = TrainSettings(**record["settings"])
        if is_streamed(settings, record) or data.streamable_bytes(settings.data) > MOST_BYTES:
            return None
        parts = read_data(settings, record)
        return parts if parts.digests() == hashes else None
    return None
