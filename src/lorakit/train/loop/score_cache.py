"""Keep the evaluation before the first step in a file, so that the next run with the same start need not repeat it.

An evaluation is found by `start_key`, from the trained tensors and the evaluation batches. Runs that differ only in the
learning rate or the number of steps, for example, share an entry. A missing, damaged or unwritable file is ignored: the
model is evaluated. If two processes write at the same time, the entry of one of them may be lost.
"""

from __future__ import annotations

from typing import Any

from lorakit.caches import EVALUATIONS
from lorakit.durable import is_sealed, read_json, sealed, write_json
from lorakit.errors import AdapterFileError, DiskError
from lorakit.ops import choices
from lorakit.session.measuring import Evaluation
from lorakit.train.files.checkpoint import environment
from lorakit.train.setup.run_context import Run
from lorakit.train.setup.start_key import start_key

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
        scores = {str(n): value if isinstance(value, str) else float(value) for n, value in entry["scores"].items()}
        return Evaluation(float(entry["loss"]), int(entry["tokens"]), scores)
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
        entries[key] = {"loss": found.loss, "tokens": found.tokens, "scores": dict(found.scores)}
        newest = [{"key": name, **entry} for name, entry in entries.items()][-MOST_KEPT:]
        write_json(EVALUATIONS.path(), sealed({"format": EVALUATIONS.format, "scores": newest}))
    except (DiskError, OSError) as cause:
        return str(cause).removesuffix(".")
    return ""


def key_of(run: Run) -> str | None:
    """Return the key of a run's evaluation, which depends on the run's current tensors.

    Args:
        run: A run with evaluation data.

    Returns:
        64 hexadecimal digits; None if there is no evaluation data, or for the reasons that `start_key` gives.
    """
    held_out = run.batches.held_out
    if held_out is None:
        return None
    facts = {
        "accelerated": run.spec.settings.accelerate,
        "int8_scales": None if run.loaded.int8 is None else run.loaded.int8.record["scales_sha256"],
        "packed": run.loaded.acceleration is not None and run.loaded.acceleration.packs,
    }
    quantization, kernels = run.spec.quantization_values, choices.to_strings(run.loaded.choices)
    here = environment(run.spec.device, run.plan.dtype, quantization, kernels)
    return start_key(EVALUATIONS, run.loaded.model, run.spec, here, facts, run.updates.named, held_out())


def _entries() -> dict[str, dict[str, Any]]:
    """Return the entries of the file by key, oldest first; empty if it is missing or damaged.

    Raises:
        DiskError: There is no cache directory.
    """
    try:
        content = read_json(EVALUATIONS.path(), _MAX_BYTES)
    except (AdapterFileError, OSError):
        return {}
    is_known = isinstance(content, dict) and is_sealed(content) and content.get("format") == EVALUATIONS.format
    entries = content["scores"] if is_known and isinstance(content.get("scores"), list) else []
    return {entry.pop("key"): entry for entry in entries if isinstance(entry, dict) and "key" in entry}
