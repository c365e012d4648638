"""`run.json`: what a run was asked to do, what that came to, on which machine, and how it ended.

Knows the file's fields; the numbers come from those who computed them.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import lorakit
from lorakit import durable
from lorakit.errors import AdapterFileError, RunError, UsageError
from lorakit.report.runs import RUN_FILE
from lorakit.train.lock import refuse_live

FORMAT = 1
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
_MAX_RECORD_BYTES = 4 << 20


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run that a folder holds.

    Args:
        folder: The run folder.

    Returns:
        The record, or None where the folder holds no run.

    Raises:
        RunError: There is a record, but it cannot be read.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return None
    try:
        record = durable.read_json(path, _MAX_RECORD_BYTES)
    except AdapterFileError as cause:
        raise RunError(f"{cause} The run cannot go on without it; train into a new --output-dir.") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("settings"), dict):
        raise RunError(f"{path}: not the record of a run in format {FORMAT}, which this version of lorakit reads.")
    return record


def refuse_second_run(folder: Path) -> NoReturn:
    """Refuse to start a run where one already is.

    Raises:
        RunError: That run is active.
        UsageError: It is not; the message gives the ways out.
    """
    refuse_live(folder)
    raise UsageError(
        f"{folder}: already holds a run. Give --resume to go on with it, --overwrite to replace it, "
        "or another --output-dir."
    )


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record, whole or not at all.

    Raises:
        DiskError: The disk refuses.
    """
    durable.write_json(folder / RUN_FILE, {"format": FORMAT, **record})


def versions() -> dict[str, str]:
    """Versions of Python, lorakit and the packages that decide results; without those not installed."""
    found = {"python": platform.python_version(), "lorakit": lorakit.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def data_hashes(paths: list[str]) -> dict[str, str]:
    """SHA-256 of data files by path.

    Args:
        paths: The files, which have been read already.

    Returns:
        Hexadecimal digests by path, in the order given.
    """
    return {path: durable.sha256_file(path) for path in paths}
