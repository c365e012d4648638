"""Keep the evaluation before the first step in a file, so that the next run with the same start need not repeat it.

An evaluation is found by a hash of everything that its bits depend on: the base's weight files and config, the trained
tensors, the evaluation batches, the precision, the kernels, the machine and the versions. Runs that differ only in, for
example, the learning rate or the number of steps share an entry. A missing, damaged or unwritable file is ignored: the
model is evaluated. If two processes write at the same time, the entry of one of them may be lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorakit
from lorakit.core import weight_file_hashes
from lorakit.data import Batch
from lorakit.durable import is_sealed, read_json, sealed, write_json
from lorakit.errors import AdapterFileError, DiskError
from lorakit.machine import cache_directory
from lorakit.ops import choices
from lorakit.speed import tuning
from lorakit.train.checkpoint import environment
from lorakit.train.evaluation import Evaluation
from lorakit.train.run_context import Run
from lorakit.train.run_folder import versions

FILE = "scores.json"
"""Name of the file in lorakit's cache directory."""

FORMAT = 1
"""Format of the file, and version of how an evaluation is computed; increased when either changes."""

MOST_KEPT = 500
"""Maximum number of entries; the oldest are removed."""

LEAST_SECONDS = 1.0
"""Minimum processor time of an evaluation that is kept; a shorter one is not worth a file."""

_MAX_BYTES = 4 << 20


def read(key: str) -> Evaluation | None:
    """Return the evaluation that was kept under a key, or None.

    Args:
        key: Result of `key_of`.
    """
    try:
        entry = _entries().get(key)
        if entry is None:
            return None
        metrics = {str(name): float(value) for name, value in entry["metrics"].items()}
        return Evaluation(float(entry["loss"]), int(entry["tokens"]), metrics)
    except (KeyError, TypeError, ValueError, AttributeError, DiskError):
        return None


def write(key: str, found: Evaluation) -> str:
    """Keep an evaluation.

    Args:
        key: Result of `key_of`.
        found: The evaluation.

    Returns:
        Reason why it could not be kept, or "".
    """
    try:
        entries = {name: entry for name, entry in _entries().items() if name != key}
        entries[key] = {"loss": found.loss, "tokens": found.tokens, "metrics": dict(found.metrics)}
        newest = [{"key": name, **entry} for name, entry in entries.items()][-MOST_KEPT:]
        write_json(cache_directory() / FILE, sealed({"format": FORMAT, "scores": newest}))
    except (DiskError, OSError) as cause:
        return str(cause).removesuffix(".")
    return ""


def key_of(run: Run) -> str | None:
    """Return the key of a run's evaluation, which depends on the run's current tensors.

    Args:
        run: A run with evaluation data.

    Returns:
        64 hexadecimal digits; None if the cache is off, if several processes share the evaluation, if the weight files
        of the base are not known, or if there is no evaluation data.
    """
    held_out = run.batches.held_out
    if not run.spec.settings.token_cache or not run.spec.processes.is_alone or held_out is None:
        return None
    files = weight_file_hashes(run.model)
    if not files:
        return None
    found = hashlib.sha256(json.dumps([FORMAT, files, _facts(run)], sort_keys=True, default=str).encode())
    _add_tensors(found, run.named)
    _add_batches(found, held_out())
    return found.hexdigest()


def _facts(run: Run) -> dict[str, Any]:
    """Return what affects the bits of an evaluation besides weights, trained tensors and data."""
    spec, model = run.spec, run.model
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "config": config.to_dict() if config is not None else None,
        "attention": getattr(config, "_attn_implementation", None),
        "adapter": spec.forecast.config.to_dict(),
        "task": spec.task.as_dict(),
        "environment": environment(
            spec.device, run.plan.dtype, spec.quantization_values, choices.to_strings(run.choices)
        ),
        "machine": tuning.machine(),
        "versions": versions(),
        "source": _source_files(),
        "accelerated": spec.settings.accelerate,
        "int8": None if run.int8 is None else run.int8.record["scales_sha256"],
        "packed": run.acceleration is not None and run.acceleration.packs,
    }


def _source_files() -> list[tuple[str, int, int]]:
    """Return size and modification time of lorakit's source, which changes between versions while it is developed."""
    folder = Path(lorakit.__file__).parent
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".c", ".h"))
    return [(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns) for path, status in found]


def _add_tensors(found: Any, named: Iterable[tuple[str, nn.Parameter | Tensor]]) -> None:
    for name, tensor in named:
        _add(found, name, tensor)


def _add_batches(found: Any, batches: Iterable[Batch]) -> None:
    for batch in batches:
        parts = {"ids": batch.input_ids, "mask": batch.attention_mask, "labels": batch.labels, **batch.extra}
        for name, tensor in parts.items():
            _add(found, name, tensor)


def _add(found: Any, name: str, tensor: Tensor) -> None:
    """Add the name, the type, the shape and the bits of a tensor (any shape) to a hash."""
    found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _entries() -> dict[str, dict[str, Any]]:
    """Return the entries of the file by key, oldest first; empty if it is missing or damaged.

    Raises:
        DiskError: There is no cache directory.
    """
    try:
        content = read_json(cache_directory() / FILE, _MAX_BYTES)
    except (AdapterFileError, OSError):
        return {}
    is_known = isinstance(content, dict) and is_sealed(content) and content.get("format") == FORMAT
    entries = content["scores"] if is_known and isinstance(content.get("scores"), list) else []
    return {entry.pop("key"): entry for entry in entries if isinstance(entry, dict) and "key" in entry}
