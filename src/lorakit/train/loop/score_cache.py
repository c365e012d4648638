"""Results at the start of a run that are kept for later runs with the same start, such as its first evaluation.

`start_key` is a hash of everything that the bits of a result depend on: the inputs of its cache in `lorakit.caches`.
Runs that differ only in the learning rate or the number of steps, for example, share an entry. A missing, damaged or
unwritable file is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.caches import EVALUATIONS, Cache, code
from lorakit.core import weight_file_inputs
from lorakit.data import Batch
from lorakit.errors import DiskError
from lorakit.ops import choices
from lorakit.session.measuring import Evaluation
from lorakit.speed import tuning
from lorakit.train.files.checkpoint import environment
from lorakit.train.loop.run import Run
from lorakit.train.spec import RunSpec

MOST_KEPT = 500
"""Maximum number of evaluations; the oldest are removed."""

LEAST_SECONDS = 1.0
"""Minimum processor time of an evaluation that is kept; a shorter one is not worth a file."""

_MAX_KEPT_BYTES = 256 << 20


def read(key: str) -> Evaluation | None:
    """Return the evaluation that was kept under a key of `key_of`, or None."""
    entry = read_kept(EVALUATIONS, key)
    try:
        return None if entry is None else Evaluation(float(entry["loss"]), int(entry["tokens"]), dict(entry["scores"]))
    except (KeyError, TypeError, ValueError):
        return None


def write(key: str, evaluation: Evaluation) -> str:
    """Keep an evaluation under a key of `key_of`; return the reason why it could not be kept, or ""."""
    values = {"loss": evaluation.loss, "tokens": evaluation.tokens, "scores": dict(evaluation.scores)}
    return write_kept(EVALUATIONS, key, values, MOST_KEPT)


def key_of(run: Run) -> str | None:
    """Return the key of a run's first evaluation, which depends on its current tensors; see `start_key` for None."""
    held_out = run.batches.held_out
    if held_out is None:
        return None
    facts = {
        "accelerated": run.spec.settings.accelerate,
        "int8_scales": None if run.loaded.int8 is None else run.loaded.int8.record["scales_sha256"],
        "packed": run.loaded.acceleration is not None and run.loaded.acceleration.packs,
    }
    quantization, kernels = run.spec.quantization_values, choices.to_strings(run.loaded.choices)
    here = environment(run.spec.device, run.plan.job.dtype, quantization, kernels)
    return start_key(EVALUATIONS, run.loaded.model, run.spec, here, facts, run.updates.named, held_out())


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
        content = cache.read(cache.path() / f"{key}.json", _MAX_KEPT_BYTES)
    except DiskError:  # no home directory
        return None
    return content if content.get("key") == key else None


def write_kept(cache: Cache, key: str, values: Mapping[str, Any], most: int) -> str:
    """Keep JSON values in a file, and at most this number of files; return why they could not be kept, or ""."""
    try:
        path = cache.path() / f"{key}.json"
        problem = cache.write({"key": key, **values}, path)
        files = [] if problem else sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)
        for old in files[:-most]:
            old.unlink(missing_ok=True)
    except (DiskError, OSError) as cause:
        return str(cause).removesuffix(".")
    return problem


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    """Add the name, the type, the shape and the bits of a tensor (any shape) to a hash."""
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
