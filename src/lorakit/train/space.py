"""Disk space of a run, known before its first step: checkpoints, the published adapter, the log.

Sizes come from the tensors themselves; nothing is written here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorakit.core.attachment.saving import saved_form
from lorakit.errors import DiskError
from lorakit.tables import format_bytes
from lorakit.train.checkpoint import checkpoints
from lorakit.train.run_folder import run_files
from lorakit.train.run_spec import ADAPTER, Ready, Request

_MOMENT_BYTES = 2 * 4
_FOLDER_BYTES = 64 << 10  # configs, manifests, random generators, the model card
_HEADER_BYTES = 512  # of a tensor in safetensors, and its line in JSON
_ROW_BYTES = 400  # of metrics.jsonl
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")


@dataclass(frozen=True)
class Space:
    """Bytes on disk that a run needs.

    Attributes:
        checkpoint: One checkpoint.
        adapter: The published adapter with its tokenizer.
        log: `metrics.jsonl` and `run.json`.
        kept: Checkpoints that are there at once, without those that are there already.
        writing: 1 if one more checkpoint is written before the oldest is removed, else 0.
    """

    checkpoint: int
    adapter: int
    log: int
    kept: int
    writing: int

    @property
    def least(self) -> int:
        """Bytes that the result alone needs."""
        return self.adapter + self.log

    @property
    def whole(self) -> int:
        """The largest sum at any time."""
        return self.kept * self.checkpoint + max(self.writing * self.checkpoint, self.adapter) + self.log


def check_space(ready: Ready, space: Space) -> list[str]:
    """Compare what a run needs with what is free; nothing is changed.

    Args:
        ready: The run, before its first step.
        space: What it needs.

    Returns:
        A warning if not all checkpoints fit.

    Raises:
        DiskError: Not even the adapter fits.
    """
    folder = ready.request.folder
    free = shutil.disk_usage(folder).free
    if ready.request.settings.overwrite:
        free += bytes_of(run_files(folder))
    there = f"{format_bytes(free)} are free"
    if free < space.least:
        raise DiskError(
            f"{folder}: the disk is too full for this run: the adapter alone needs {format_bytes(space.least)}, and "
            f"{there}. Free space, or pass an --output-dir on another disk.",
            where=folder,
        )
    if free < space.whole:
        return [
            f"warning: {folder}: the checkpoints may not all fit: {format_bytes(space.whole)} are needed "
            f"({format_bytes(space.checkpoint)} each), and {there}. If one does not fit, the adapter alone is saved."
        ]
    return []


def check_checkpoint(folder: Path, space: Space) -> None:
    """Check that a checkpoint leaves room for the result of the run.

    Args:
        folder: The run directory.
        space: What the run needs.

    Raises:
        DiskError: It does not.
    """
    free = shutil.disk_usage(folder).free
    if free < space.checkpoint + space.least:
        raise DiskError(
            f"{folder}: a checkpoint of {format_bytes(space.checkpoint)} would leave no room for the adapter that the "
            f"run ends with ({format_bytes(space.least)}): {format_bytes(free)} are free.",
            where=folder,
        )


def needed(ready: Ready) -> Space:
    """Return what a run needs from where it is to its end.

    Args:
        ready: The run.
    """
    request, settings, pace = ready.request, ready.request.settings, ready.pace
    tensors = saved_form(ready.trainee.model, ADAPTER).tensors
    adapter = sum(tensor.numel() * tensor.element_size() + _HEADER_BYTES for tensor in tensors.values())
    moments = sum(_MOMENT_BYTES * p.numel() + 3 * _HEADER_BYTES for _, p in ready.trainee.named)
    tokenizer = _tokenizer_bytes(request)
    of_checkpoint = adapter + moments + _FOLDER_BYTES + (tokenizer if request.forecast.new_tokens else 0)
    steps = max(0, pace.total_steps - ready.state.step)
    evaluated = ready.batches.held_out is not None
    saves = -(-steps // min(pace.save_steps, pace.eval_steps if evaluated else pace.save_steps)) + 1
    there = len(checkpoints(request.folder)) if settings.resume else 0
    kept = max(settings.save_total_limit, 2 if evaluated else 1)  # the best and the newest are never removed
    return Space(
        checkpoint=of_checkpoint,
        adapter=adapter + tokenizer + _FOLDER_BYTES,
        log=_FOLDER_BYTES + 2 * _ROW_BYTES * steps,
        kept=max(0, min(kept, saves + there) - there),
        writing=int(saves + there > kept),
    )


def bytes_of(paths: Iterable[Path]) -> int:
    """Return the bytes of files, and of those in folders."""
    files = (inner for path in paths for inner in (path, *path.rglob("*")) if inner.is_file())
    return sum(file.stat().st_size for file in files)


def _tokenizer_bytes(request: Request) -> int:
    """The tokenizer's files in the model's directory, or, of a model elsewhere, its own text."""
    source = Path(request.source.path_or_id)
    if source.is_dir():
        return bytes_of({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern)})
    backend = getattr(request.tokenizer, "backend_tokenizer", None)
    return 0 if backend is None else len(backend.to_str(pretty=True).encode())
