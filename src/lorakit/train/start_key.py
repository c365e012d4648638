"""The key of a result that is kept for later runs: a hash of everything that its bits depend on.

That is the base's weight files and config, given tensors and batches, the precision, the kernels, the machine, the
versions and lorakit's source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import lorakit
from lorakit.core import weight_file_hashes
from lorakit.data import Batch
from lorakit.speed import tuning
from lorakit.train.checkpoint import environment
from lorakit.train.run_folder import versions

if TYPE_CHECKING:
    from lorakit.train.run_spec import RunSpec


def start_key(
    model: nn.Module,
    spec: RunSpec,
    dtype: str,
    facts: Mapping[str, Any],
    named: Iterable[tuple[str, Tensor]],
    batches: Iterable[Batch],
    kernels: Sequence[str] = (),
) -> str | None:
    """Return a key of a result that was computed at the start of a run.

    Args:
        model: The run's model.
        spec: The run's specification.
        dtype: Precision of the base.
        facts: JSON values that the result depends on, in addition to those of the model, the run, and this process.
        named: (name, tensor) pairs of tensors (any shape) of the model that are not in the base's files.
        batches: The batches from which the result is computed.
        kernels: Autotuned kernel choices.

    Returns:
        64 hexadecimal digits; None if the cache is off, if several processes share the computation, or if the weight
        files of the base are not known.
    """
    files = weight_file_hashes(model)
    if not spec.settings.token_cache or not spec.processes.is_alone or not files:
        return None
    config = getattr(model, "config", None)
    known = {
        "files": files,
        "class": type(model).__name__,
        "config": config.to_dict() if config is not None else None,
        "attention": getattr(config, "_attn_implementation", None),
        "adapter": spec.forecast.config.to_dict(),
        "task": spec.task.as_dict(),
        "environment": environment(spec.device, dtype, spec.quantization_values, kernels),
        "machine": tuning.machine(),
        "versions": versions(),
        "source": _source_files(),
        **facts,
    }
    found = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in named:
        _add(found, name, tensor)
    for batch in batches:
        parts = {"ids": batch.input_ids, "mask": batch.attention_mask, "labels": batch.labels, **batch.extra}
        for name, tensor in parts.items():
            _add(found, name, tensor)
    return found.hexdigest()


def _source_files() -> list[tuple[str, int, int]]:
    """Return size and modification time of lorakit's source, which changes between versions while it is developed."""
    folder = Path(lorakit.__file__).parent
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".c", ".h"))
    return [(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns) for path, status in found]


def _add(found: Any, name: str, tensor: Tensor) -> None:
    """Add the name, the type, the shape and the bits of a tensor (any shape) to a hash."""
    found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
