"""Python's language reference as training text: prose that is available on every machine with Python.

The standard library ships it for `help()`, as `pydoc_data.topics`: some 80 topics, half a million characters.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lorakit.data.loader import split
from lorakit.data.records import Document, Records
from lorakit.durable import write_text
from lorakit.errors import DataError

DEFAULT_HELD_OUT = 0.1
"""Fraction of the topics that is held out by default."""


def python_reference() -> Records:
    """Return the topics of the language reference, one document each, sorted by name.

    Returns:
        The documents; their `source` is `python-reference/<topic>`.

    Raises:
        DataError: This Python was installed without its help texts.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as cause:
        raise DataError(
            "This Python has no pydoc_data.topics, the language reference that help() shows; "
            "install the full standard library."
        ) from cause
    return Records(Document(topics[name], f"python-reference/{name}") for name in sorted(topics))


def write_python_reference(
    directory: str | os.PathLike[str], held_out_fraction: float = DEFAULT_HELD_OUT, seed: int = 0
) -> tuple[Path, Path]:
    """Write the language reference as two JSON Lines files, with whole topics held out.

    Args:
        directory: Directory of `train.jsonl` and `eval.jsonl`; created if missing.
        held_out_fraction: Fraction of the topics in `eval.jsonl`.
        seed: Seed of the choice.

    Returns:
        Paths of both files.

    Raises:
        ConfigError: The fraction is outside [0, 1).
        DataError: This Python was installed without its help texts.
        DiskError: The files cannot be written.
    """
    parts = split(python_reference(), held_out_fraction, seed)
    paths = Path(directory) / "train.jsonl", Path(directory) / "eval.jsonl"
    for path, records in zip(paths, (parts.train, parts.held_out), strict=True):
        rows = [record for record in records if isinstance(record, Document)]
        write_text(path, "".join(json.dumps({"text": row.text}) + "\n" for row in rows))
    return paths
