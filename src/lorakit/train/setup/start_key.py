"""Results that are kept for later runs: their key, a hash of everything that their bits depend on, and their files.

The inputs of a key are those of the result's cache in `lorakit.caches`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.caches import Cache, code
from lorakit.core import weight_file_inputs
from lorakit.data import Batch
from lorakit.durable import is_sealed, read_json, sealed, write_json
from lorakit.errors import AdapterFileError, DiskError
from lorakit.speed import tuning

if TYPE_CHECKING:
    from lorakit.train.setup.run_spec import RunSpec

_MAX_BYTES = 256 << 20


def start_key(
    cache: Cache,
    model: nn.Module,
    spec: RunSpec,
    environment: Mapping[str, Any],
    facts: Mapping[str, Any],
    named: Iterable[tuple[str, Tensor]],
    batches: Iterable[Batch],
) -> str | None:
    """Return a key of a result that was computed at the start of a run.

    Args:
        cache: Cache of the result.
        model: The run's model.
        spec: The run's specification.
        environment: Result of `checkpoint.environment`.
        facts: The cache's inputs in addition to those of the model, the run, and this process.
        named: (name, tensor) pairs of tensors (any shape) of the model that are not in the base's files.
        batches: The batches from which the result is computed.

    Returns:
        64 hexadecimal digits; None if the cache is off, if several processes share the computation, or if the weight
        files of the base are not known.
    """
    files = weight_file_inputs(model)
    if not spec.settings.token_cache or not spec.processes.is_alone or not files:
        return None
    config = getattr(model, "config", None)
    rows = hashlib.sha256()
    for batch in batches:
        parts = {"ids": batch.input_ids, "mask": batch.attention_mask, "labels": batch.labels, **batch.extra}
        for name, tensor in parts.items():
            _add(rows, name, tensor)
    tensors = hashlib.sha256()
    for name, tensor in named:
        _add(tensors, name, tensor)
    return cache.key(
        weights=files,
        new_tensors=tensors.hexdigest(),
        config=config.to_json_string(use_diff=False) if config is not None else None,
        model_class=type(model).__name__,
        attention=getattr(config, "_attn_implementation", None),
        adapter=spec.forecast.config.as_json(),
        task=spec.task.as_dict(),
        rows=rows.hexdigest(),
        environment=dict(environment),
        machine=tuning.machine(),
        code=code(),
        **facts,
    )


def read_kept(cache: Cache, key: str) -> dict[str, Any] | None:
    """Return the contents of the file that was kept under a key, or None if it is missing or damaged."""
    try:
        content = read_json(cache.path() / f"{key}.json", _MAX_BYTES)
    except (AdapterFileError, DiskError, OSError):
        return None
    is_whole = isinstance(content, dict) and is_sealed(content)
    return content if is_whole and (content.get("format"), content.get("key")) == (cache.format, key) else None


def write_kept(cache: Cache, key: str, values: Mapping[str, Any], most: int) -> str:
    """Keep JSON values in a file, and at most this number of files; return why they could not be kept, or ""."""
    try:
        path = cache.path() / f"{key}.json"
        write_json(path, sealed({"format": cache.format, "key": key, **values}))
        files = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)
        for old in files[:-most]:
            old.unlink(missing_ok=True)
    except (DiskError, OSError) as cause:
        return str(cause).removesuffix(".")
    return ""


def _add(found: Any, name: str, tensor: Tensor) -> None:
    """Add the name, the type, the shape and the bits of a tensor (any shape) to a hash."""
    found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
