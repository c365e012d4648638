"""What is checked and read before anything is loaded or written: place, machine, data.

Each check takes far less than a second and names what is wrong. Knows nothing about models beyond a tokenizer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lorakit import durable
from lorakit.data import (
    AnyRecords,
    Batch,
    DataReport,
    Encoded,
    Loader,
    StoredRecords,
    Tokenizer,
    by_length,
    encode,
    padding_id,
    read_records,
    split,
)
from lorakit.errors import DataError, DiskError, NotYetSupported, RunError, UsageError
from lorakit.report.runs import METRICS_FILE, RUN_FILE
from lorakit.train import adapter_only
from lorakit.train.checkpoint import checkpoints
from lorakit.train.lock import claim, refuse_live, release
from lorakit.train.progress import Progress, Silence
from lorakit.train.record import refuse_second_run
from lorakit.train.settings import TrainSettings

ADAPTER_FOLDER = "adapter"
PLOT_FILE = "loss.svg"


@dataclass(frozen=True)
class RunData:
    """Records of a run, before a tokenizer has seen them.

    Attributes:
        train: What is trained on.
        held_out: What is evaluated on; may be empty.
        note: A sentence on what is held out, or why nothing is.
    """

    train: AnyRecords
    held_out: AnyRecords
    note: str


@dataclass(frozen=True)
class RunBatches:
    """Data of a run as batches.

    Attributes:
        loader: Training batches, endless, in a seeded order.
        held_out: Gives the evaluation batches anew, or None where nothing is held out.
        train_report: What became of the training records.
        held_out_report: What became of the others, or None.
    """

    loader: Loader
    held_out: Callable[[], Iterable[Batch]] | None
    train_report: DataReport
    held_out_report: DataReport | None


def refuse_many_processes() -> None:
    """Refuse to run as one of several processes that know nothing of each other.

    Raises:
        NotYetSupported: WORLD_SIZE is above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.strip() not in ("", "0", "1"):
        raise NotYetSupported(
            f"WORLD_SIZE is {size}: training on several processes is not built yet; start one, without torchrun."
        )


def pick_device(word: str) -> torch.device:
    """The device that a word means on this machine.

    Args:
        word: "auto", "cpu", "cuda", "cuda:N" or "mps".

    Returns:
        The device; for "auto" an accelerator where there is one.

    Raises:
        UsageError: There is no such device here.
    """
    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(word)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"device is {word!r}, but torch {torch.__version__} finds {count} CUDA devices here.")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device is {word!r}, but torch {torch.__version__} finds no MPS device here.")
    return device


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
        raise RunError(f"{folder}: is not a folder; --output-dir must be one, or not exist yet.")
    refuse_live(folder)
    if settings.resume and not folder.exists():
        raise RunError(f"{folder}: holds no run to resume; leave out --resume to start one.")
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
        raise DiskError(f"{folder}: cannot be made ({cause.strerror}).") from cause
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
        raise DiskError(f"{cause.filename}: the old run cannot be removed ({cause.strerror}).") from cause


def read_data(settings: TrainSettings) -> RunData:
    """Read training and evaluation files, and hold out a share where no evaluation files are given.

    Args:
        settings: `data`, `eval_data`, `eval_fraction` and `seed` are read.

    Returns:
        The records.

    Raises:
        DataError: A file cannot be read, or a row is bad; the message has file and line.
    """
    records = read_records(settings.data)
    if settings.eval_data is not None:
        held_out = read_records(settings.eval_data)
        return RunData(records, held_out, f"Evaluation on {', '.join(settings.eval_data)}.")
    parted = split(records, settings.eval_fraction, settings.seed)
    return RunData(parted.train, parted.held_out, parted.note)


def make_batches(
    settings: TrainSettings, data: RunData, tokenizer: Tokenizer, max_length: int, progress: Progress | None = None
) -> RunBatches:
    """Encode the records and set up the loaders.

    Args:
        settings: Batch size and seed are read.
        data: The records.
        tokenizer: The model's.
        max_length: Longest row, in tokens.
        progress: Shows how far tokenizing is; None is silent.

    Returns:
        Loader, evaluation batches and reports.

    Raises:
        DataError: No token is left to train or to evaluate on.
    """
    rows, pad = settings.per_device_train_batch_size, padding_id(tokenizer)
    progress = progress or Silence()
    train = encode(data.train, tokenizer, max_length, _watch(progress, "training data", data.train))
    loader = Loader(train.sequences, rows, settings.seed, pad_id=pad)
    if not data.held_out:
        return RunBatches(loader, None, train.report, None)
    try:
        watch = _watch(progress, "evaluation data", data.held_out)
        held_out = encode(data.held_out, tokenizer, max_length, watch)
    except DataError as cause:
        raise DataError(f"In the evaluation data: {cause}") from cause
    return RunBatches(loader, evaluation_batches(held_out, rows, pad), train.report, held_out.report)


def _watch(progress: Progress, what: str, records: AnyRecords) -> Callable[[int], None] | None:
    if not isinstance(records, StoredRecords):
        return None
    return partial(_tell, progress, what, records.total_bytes)


def _tell(progress: Progress, what: str, total: int, done: int) -> None:
    progress.reading(what, done, total)


def evaluation_batches(encoded: Encoded, rows: int, pad: int) -> Callable[[], Iterable[Batch]]:
    """Batches for evaluation: each sequence once, `by_length`.

    Args:
        encoded: The sequences.
        rows: Rows of a batch of the longest.
        pad: The id that fills rows up.

    Returns:
        A function that gives the batches anew.
    """
    return lambda: by_length(encoded.sequences, rows, pad)
