"""The key of a result that is kept for later runs: a hash of everything that its bits depend on.

The inputs are those of the result's cache in `lorakit.caches`.
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
from lorakit.speed import tuning

if TYPE_CHECKING:
    from lorakit.train.setup.run_spec import RunSpec


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


def _add(found: Any, name: str, tensor: Tensor) -> None:
    """Add the name, the type, the shape and the bits of a tensor (any shape) to a hash."""
    found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
