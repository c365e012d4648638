"""`run.json`: what a run was asked to do, what that came to, on which machine, and how it ended.

Knows the file's fields; the numbers come from those who computed them.

`metrics.jsonl`: one row per optimizer step and per evaluation, appended as they happen.

Knows the rows' fields and the file; `lorakit.report` reads it back.

The lock of a run directory: one process trains into a folder at a time.

The folder itself is locked (flock), so that no file is left and the system frees it however the process ends.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import lorakit
from lorakit import durable
from lorakit.errors import AdapterFileError, DiskError, RunError, UsageError
from lorakit.report import METRICS_FILE, RUN_FILE, read_metrics
from lorakit.train import adapter_only
from lorakit.train.checkpoint import checkpoints
from lorakit.train.settings import TrainSettings

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
        raise RunError(f"{cause} The run cannot go on without it; train into a new --output-dir.", where=path) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("settings"), dict):
        raise RunError(
            f"{path}: not the record of a run in format {FORMAT}, which this version of lorakit reads.", where=path
        )
    return record


def refuse_second_run(folder: Path) -> NoReturn:
    """Refuse to start a run where one already is.

    Raises:
        RunError: That run is active.
        UsageError: It is not; the message gives the ways out.
    """
    refuse_live(folder)
    raise UsageError(
        f"a run exists in {folder}; pass --resume to continue it, --overwrite to replace it, or another --output-dir.",
        where=folder,
        field="output_dir",
        allowed=("resume", "overwrite"),
        override="overwrite",
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


TRAIN_FIELDS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "seconds",
    "tokens_per_second",
    "peak_rss_bytes",
)
EVAL_FIELDS = ("step", "eval_loss", "eval_perplexity", "eval_tokens")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsLog:
    """Appends whole lines to `metrics.jsonl`; a crash can only tear the last one, which readers drop.

    On a full disk rows wait in memory and are written with the next one that fits.

    Attributes:
        path: The file.
        waiting: Rows that have not been written, as lines.

    Raises:
        DiskError: The file cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as cause:
            raise DiskError(
                f"{self.path}: cannot be opened for writing ({cause.strerror}).", where=self.path
            ) from cause
        self.waiting: list[bytes] = []

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write()
        finally:
            self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row.

        Args:
            row: Exactly the fields of `TRAIN_FIELDS` or `EVAL_FIELDS`, all finite.

        Raises:
            DiskError: The disk refuses, and not because it is full.
            ValueError: A value is NaN or infinite.
        """
        self.waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._write()

    def _write(self) -> None:
        whole, lines = os.fstat(self._file.fileno()).st_size, b"".join(self.waiting)
        try:
            written = self._file.write(lines)
            if written == len(lines):
                self.waiting.clear()
            else:
                self._file.truncate(whole)  # a part of a row must not be followed by another
        except OSError as cause:
            if cause.errno not in _FULL:
                raise DiskError(f"{self.path}: cannot be written ({cause.strerror}).", where=self.path) from cause

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint never knows of a row that a power cut takes away.

        Raises:
            DiskError: The disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as cause:
            raise DiskError(f"{self.path}: cannot be written ({cause.strerror}).", where=self.path) from cause


def cut(folder: Path, step: int, evaluated_step: int) -> int:
    """Drop the rows that a checkpoint does not know of, and a torn last line; they will come again.

    Args:
        folder: The run folder.
        step: The last step of the checkpoint; -1 drops all.
        evaluated_step: The last step that it knows an evaluation of; -1 for none.

    Returns:
        How many whole rows were dropped.

    Raises:
        DiskError: The disk refuses; the old file then still stands.
    """
    rows = read_metrics(folder).rows
    kept = [row for row in rows if row["step"] <= (evaluated_step if "eval_loss" in row else step)]
    durable.write_text(folder / METRICS_FILE, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    return len(rows) - len(kept)


_ATTEMPTS = 3
_PAUSE_SECONDS = 0.05
_LOCKS = Path("/proc/locks")


def claim(folder: Path) -> int:
    """Lock a folder for this process.

    Args:
        folder: The folder; it exists.

    Returns:
        A descriptor that holds the lock until it is closed; -1 if the system or file system has no such locks.

    Raises:
        RunError: Another process has it.
    """
    for attempt in range(_ATTEMPTS):
        descriptor = _locked(folder)
        if descriptor is not None:
            return descriptor
        if attempt + 1 < _ATTEMPTS:  # `refuse_live` of another process holds it for a moment
            time.sleep(_PAUSE_SECONDS)
    raise _live(folder)


def release(lock: int) -> None:
    """Unlock a folder.

    Args:
        lock: What `claim` gave.
    """
    if lock >= 0:
        os.close(lock)


def refuse_live(folder: Path) -> None:
    """Refuse a folder that another process is training into; a folder that does not exist is free.

    Args:
        folder: The folder.

    Raises:
        RunError: Another process has it.
    """
    if folder.is_dir():
        release(claim(folder))


def _locked(folder: Path) -> int | None:
    """The descriptor of a locked folder, -1 without locks, None if another process has it."""
    try:
        import fcntl
    except ImportError:
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        os.close(descriptor)
        return None if cause.errno in (errno.EWOULDBLOCK, errno.EACCES) else -1
    return descriptor


def _live(folder: Path) -> RunError:
    process = _owner(folder)
    who = "another process" if process is None else f"process {process}"
    return RunError(
        f"{folder}: a run is active here: {who} is training into this folder. Wait until it ends, or pass another "
        "--output-dir.",
        what=who,
        where=folder,
        field="output_dir",
    )


def _owner(folder: Path) -> int | None:
    """The process that holds the lock, where Linux tells: number, type, kind, mode, pid, major:minor:inode, range."""
    try:
        inode, rows = folder.stat().st_ino, _LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = {
        int(words[4])
        for words in map(str.split, rows)
        if len(words) == 8 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode)
    }
    return found.pop() if len(found) == 1 and min(found) > 0 else None


ADAPTER_FOLDER = "adapter"
PLOT_FILE = "loss.svg"


def check_place(settings: TrainSettings) -> None:
    """Check that the run folder can take this run; nothing is written.

    Args:
        settings: `output_dir`, `resume` and `overwrite` are read.

    Raises:
        UsageError: A run is there and neither resume nor overwrite was asked for.
        RunError: The path is no folder, another process is training into it, or resume was asked for and there is
            nothing to resume.
    """
    folder = Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunError(
            f"{folder}: is not a folder; --output-dir must be one, or not exist yet.", where=folder, field="output_dir"
        )
    refuse_live(folder)
    if settings.resume and not folder.exists():
        raise RunError(
            f"{folder}: holds no run to resume; leave out --resume to start one.", where=folder, field="resume"
        )
    if holds_run(folder) and not (settings.resume or settings.overwrite):
        refuse_second_run(folder)


def claim_place(folder: Path) -> int:
    """Make the run folder, take it for this process, see that it can be written to, and sweep it.

    Args:
        folder: The run folder.

    Returns:
        A descriptor that holds the folder until it is closed; -1 where the system has no such locks.

    Raises:
        RunError: Another process has it.
        DiskError: The disk is read-only, full, or refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise DiskError(f"{folder}: cannot be made ({cause.strerror}).", where=folder) from cause
    lock = claim(folder)
    try:
        durable.write_bytes(folder / f"{durable.TEMPORARY}probe", b"")
    except DiskError:
        release(lock)
        raise
    durable.sweep(folder)
    return lock


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    names = (RUN_FILE, METRICS_FILE, ADAPTER_FOLDER)
    return any((folder / name).exists() for name in names) or bool(checkpoints(folder) or adapter_only.saved(folder))


def run_files(folder: Path) -> list[Path]:
    """Return what a run has written into a folder, the record last; some of it may not be there."""
    found = [*checkpoints(folder), *adapter_only.saved(folder), *sorted(folder.glob("damaged-checkpoint-*"))]
    return found + [folder / name for name in (ADAPTER_FOLDER, PLOT_FILE, METRICS_FILE, RUN_FILE)]


def remove_run(folder: Path) -> None:
    """Remove what a run has written into a folder, and nothing else; the record goes last.

    Args:
        folder: The run folder.

    Raises:
        DiskError: The disk refuses.
    """
    try:
        for path in run_files(folder):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as cause:
        raise DiskError(
            f"{cause.filename}: the old run cannot be removed ({cause.strerror}).", where=cause.filename
        ) from cause
