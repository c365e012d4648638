"""Keep the calibration of an int8 base in a file, so that the next run with the same base and rows need not repeat it.

A file holds the input scales and the record of one calibration, sealed. It is found by `start_key`; a missing, damaged
or unwritable file is ignored: the base is calibrated.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.caches import INT8
from lorakit.durable import is_sealed, read_json, sealed, sha256_bytes, write_json
from lorakit.errors import AdapterFileError, DiskError
from lorakit.train.files.checkpoint import environment
from lorakit.train.setup.int8_rows import CalibrationRows
from lorakit.train.setup.start_key import start_key

if TYPE_CHECKING:
    from lorakit.train.setup.run_spec import RunSpec

MOST_KEPT = 20
"""Maximum number of files; the oldest are removed."""

LEAST_SECONDS = 1.0
"""Minimum processor time of a calibration that is kept; a shorter one is not worth a file."""

_MAX_BYTES = 256 << 20


def key_of(model: nn.Module, spec: RunSpec, rows: CalibrationRows) -> str | None:
    """Return the key of a calibration, or None if it is not to be kept.

    Args:
        model: The model with its adapter, before it is quantized.
        spec: The run's specification.
        rows: The calibration rows, and the size of their batches.
    """
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    facts = {"batch_tokens": rows.batch_tokens}  # sizes of batches change roundings
    here = environment(spec.device, ", ".join(dtypes), spec.quantization_values)
    return start_key(INT8, model, spec, here, facts, named, rows.rows)


def read(key: str) -> tuple[dict[str, Any], bytes] | None:
    """Return the record and the input scales that were kept under a key, or None.

    Args:
        key: Result of `key_of`.
    """
    try:
        content = read_json(_path(key), _MAX_BYTES)
        if not isinstance(content, dict) or not is_sealed(content):
            return None
        if (content.get("format"), content.get("key")) != (INT8.format, key):
            return None
        record, scales = json.loads(content["record"]), base64.b64decode(content["scales"], validate=True)
    except (AdapterFileError, DiskError, OSError, KeyError, TypeError, ValueError, binascii.Error):
        return None
    return (record, scales) if record.get("scales_sha256") == sha256_bytes(scales) else None


def write(key: str, record: Mapping[str, Any], scales: bytes) -> str:
    """Keep a calibration.

    Args:
        key: Result of `key_of`.
        record: Contents of `run.json` about the int8 base.
        scales: The input scales, as a safetensors file.

    Returns:
        Reason why it could not be kept, or "".
    """
    text = json.dumps(dict(record))  # a string keeps the order of the entries
    values = {"format": INT8.format, "key": key, "record": text, "scales": base64.b64encode(scales).decode()}
    try:
        path = _path(key)
        write_json(path, sealed(values))
        files = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)
        for old in files[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except (DiskError, OSError) as cause:
        return str(cause).removesuffix(".")
    return ""


def _path(key: str) -> Path:
    return INT8.path() / f"{key}.json"
