"""The run directory: its record `run.json`, its log `metrics.jsonl`, its lock, and its creation and removal.

The record contains the requested settings, the values that they resolved to, the environment, and how the run ended;
other modules compute these values. The log, which `lorakit.report` reads, has one row per optimizer step and one per
evaluation. The lock prevents two processes from training in the same directory. The directory itself is locked (flock),
so no lock file is left behind, and the system releases the lock no matter how the process ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import lorakit
from lorakit import durable, durable_folders
from lorakit.errors import AdapterFileError, DiskError, RunError, UsageError
from lorakit.report import INT8_FILE, METRICS_FILE, RUN_FILE, read_metrics

FORMAT = 1
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
_MAX_RECORD_BYTES = 4 << 20


@contextlib.contextmanager
def as_disk_error(path: Path, failure: str) -> Iterator[None]:
    """Convert an `OSError` in a block to a `DiskError` that names the path and what failed ("cannot be written").

    Raises:
        DiskError: The block raised an `OSError`.
    """
    try:
        yield
    except OSError as cause:
        raise DiskError(f"{path}: {failure} ({cause.strerror}).", where=path) from cause


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a run, `run.json`, or None if the directory does not contain a run.

    Raises:
        RunError: The record cannot be read.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return None
    try:
        record = durable.read_json(path, _MAX_RECORD_BYTES)
    except AdapterFileError as cause:
        raise RunError(
            f"{cause} The run cannot be resumed without this file; use another --output-dir.", where=path
        ) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("settings"), dict):
        raise RunError(
            f"{path}: not a run record of format {FORMAT}, the only format that this version of lorakit reads.",
            where=path,
        )
    return record


def raise_run_exists(folder: Path) -> NoReturn:
    """Raise the error for a directory that already contains a run.

    Raises:
        RunError: The run is still active.
        UsageError: The run is not active; the message lists the options.
    """
    check_unlocked(folder)
    raise UsageError(
        f"a run exists in {folder}; pass --resume to continue it, --overwrite to replace it, or another --output-dir.",
        where=folder,
        field="output_dir",
        allowed=("resume", "overwrite"),
        override="overwrite",
    )


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Atomically write the record of a run, `run.json`.

    Raises:
        DiskError: The file cannot be written.
    """
    durable.write_json(folder / RUN_FILE, {"format": FORMAT, **record})


def versions() -> dict[str, str]:
    """Return the versions of Python, lorakit and the installed packages that affect results."""
    from importlib import metadata

    installed = {"python": platform.python_version(), "lorakit": lorakit.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsLog(contextlib.AbstractContextManager["MetricsLog"]):
    """Writer for `metrics.jsonl`; a crash can at most truncate the last line, and readers skip a truncated line.

    If the disk is full, rows are kept in memory until a later write succeeds.

    Attributes:
        path: The file.
        waiting: Lines that have not been written yet.

    Raises:
        DiskError: The file cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        with as_disk_error(self.path, "cannot be written"):
            self._file = self.path.open("ab", buffering=0)
        self.waiting: list[bytes] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write()
        finally:
            self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row of a training step or an evaluation.

        Raises:
            DiskError: Writing failed for a reason other than a full disk.
            ValueError: A value is NaN or infinite.
        """
        self.waiting.append(log_line(row))
        self._write()

    def _write(self) -> None:
        whole, lines = os.fstat(self._file.fileno()).st_size, b"".join(self.waiting)
        with as_disk_error(self.path, "cannot be written"):
            try:
                written = self._file.write(lines)
                if written == len(lines):
                    self.waiting.clear()
                else:
                    self._file.truncate(whole)  # no row may follow a partially written one
            except OSError as cause:
                if cause.errno not in _FULL:
                    raise

    def sync(self) -> None:
        """Flush the log to the disk, so that a power failure cannot lose rows that precede a checkpoint.

        Raises:
            DiskError: The file cannot be written.
        """
        with as_disk_error(self.path, "cannot be written"):
            os.fsync(self._file.fileno())


def cut_metrics(folder: Path, step: int, evaluated_step: int) -> None:
    """Remove a truncated last line and all rows logged after a checkpoint, because the resumed run logs them again.

    A step of -1 removes all rows of that kind.

    Raises:
        DiskError: The file cannot be written; the old one is unchanged.
    """
    kept = [row for row in read_metrics(folder).rows if row["step"] <= (evaluated_step if "eval_loss" in row else step)]
    durable.write_bytes(folder / METRICS_FILE, b"".join(map(log_line, kept)))


def log_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of `metrics.jsonl`, which is always strict JSON.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    return json.dumps(row, allow_nan=False).encode() + b"\n"


_ATTEMPTS = 3
_PAUSE_SECONDS = 0.05


def lock(folder: Path) -> int:
    """Lock an existing directory for this process, and return the file descriptor that holds the lock until closed.

    It is -1 if the system or file system does not support locks.

    Raises:
        RunError: Another process holds the lock.
    """
    for attempt in range(_ATTEMPTS):
        descriptor = durable_folders.try_lock(folder)
        if descriptor is not None:
            return descriptor
        if attempt + 1 < _ATTEMPTS:  # `check_unlocked` in another process may hold the lock for a moment
            time.sleep(_PAUSE_SECONDS)
    process = durable_folders.lock_owner(folder)
    who = "another process" if process is None else f"process {process}"
    raise RunError(
        f"{folder}: a run is active: {who} is training in this directory; wait until the run ends, or use "
        "another --output-dir.",
        what=who,
        where=folder,
        field="output_dir",
    )


def unlock(descriptor: int) -> None:
    """Unlock a directory, given the result of `lock`."""
    if descriptor >= 0:
        os.close(descriptor)


def check_unlocked(folder: Path) -> None:
    """Check that no other process is training in a directory, which need not exist.

    Raises:
        RunError: Another process holds the lock.
    """
    if folder.is_dir():
        unlock(lock(folder))


ADAPTER_FOLDER = "adapter"
PLOT_FILE = "loss.svg"
TRACKER_FOLDERS = ("tensorboard", "wandb")
_STEP_IN_NAME = re.compile(r"(?:checkpoint|adapter-only)-(\d{1,12})")


def check_output_dir(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a run can use its directory; nothing is written.

    Raises:
        UsageError: The directory contains a run, and neither `resume` nor `overwrite` is set.
        RunError: The path is not a directory, another process is training in it, or `resume` is set but the directory
            does not exist.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(
            f"{folder}: not a directory; pass a directory, or a path that does not exist yet, as --output-dir.",
            where=folder,
            field="output_dir",
        )
    check_unlocked(folder)
    if resume and not folder.exists():
        raise RunError(f"{folder}: no run to resume; omit --resume to start one.", where=folder, field="resume")
    if holds_run(folder) and not (resume or overwrite):
        raise_run_exists(folder)


def lock_output_dir(folder: Path) -> int:
    """Create and lock the run directory, check that it is writable, and remove leftover temporary files; see `lock`.

    Raises:
        RunError: Another process holds the lock.
        DiskError: The directory cannot be created or written to.
    """
    with as_disk_error(folder, "cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder)
    try:
        durable.write_bytes(folder / f"{durable.TEMPORARY}probe", b"")
    except DiskError:
        unlock(descriptor)
        raise
    durable_folders.sweep(folder)
    return descriptor


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoint directories, valid or not, in order of step."""
    return _by_step(folder.glob("checkpoint-*"))


def adapters_only(folder: Path) -> list[Path]:
    """Return the directories of adapters saved without a checkpoint, in order of step."""
    return _by_step(folder.glob("adapter-only-*"))


def _by_step(paths: Iterable[Path]) -> list[Path]:
    return sorted((path for path in paths if step_of(path) >= 0 and path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step number in the name of a checkpoint or of an adapter saved without one; -1 for any other name."""
    match = _STEP_IN_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def adapter_only_path(folder: Path, step: int) -> Path:
    """Return the path for an adapter saved without a checkpoint at a given step; the path need not exist."""
    return folder / f"adapter-only-{step}"


def holds_run(folder: Path) -> bool:
    """Return whether a directory contains a run or parts of one."""
    names = (RUN_FILE, METRICS_FILE, ADAPTER_FOLDER)
    return any((folder / name).exists() for name in names) or bool(checkpoints(folder) or adapters_only(folder))


def run_files(folder: Path) -> list[Path]:
    """Return the paths of all files and directories that a run writes, the record last; some may not exist."""
    folders = [*checkpoints(folder), *adapters_only(folder), *sorted(folder.glob("damaged-checkpoint-*"))]
    return folders + [
        folder / name for name in (ADAPTER_FOLDER, *TRACKER_FOLDERS, PLOT_FILE, INT8_FILE, METRICS_FILE, RUN_FILE)
    ]


def remove_run(folder: Path) -> None:
    """Remove only what a run has written to its directory; the record is removed last.

    Raises:
        DiskError: A file cannot be removed.
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
