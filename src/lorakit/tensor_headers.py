"""Names of an adapter's tensors on disk, which are PEFT's, and the header of their safetensors file; without torch.

The header is checked completely: size, number of tensors, unique names, dtypes, and that the tensors fill the file
exactly.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from lorakit.durable import JsonObject, JsonValue, parse_json
from lorakit.errors import AdapterFileError

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"

ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
}

MAX_FILE_BYTES = 64 << 30
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 100_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Supported dtypes of factors on disk and their sizes in bytes; converting any other dtype would corrupt values."""

WHOLE_BYTES = {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""Additional dtypes supported for buffers in saved modules, such as a batch norm's batch counter."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        first: Position of its first byte in the file.
        last: Position after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file: its tensors by name, and the strings in `__metadata__`."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def file_error(path: str | os.PathLike[str], problem: str) -> AdapterFileError:
    """Return the error for a file or directory that cannot be used; the message gives the path and the problem."""
    return AdapterFileError(f"{path}: {problem}", where=path)


def parse_header(path: str | os.PathLike[str], data: bytes) -> TensorHeader:
    """Return the header of an adapter's safetensors file; an AdapterFileError says what is damaged, and where."""
    header, start = _header(path, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise file_error(path, "the header's metadata is not a JSON object of strings.")
    if len(header) > MAX_TENSORS:
        raise file_error(path, f"the header names {len(header):,} tensors; at most {MAX_TENSORS:,} are allowed.")
    tensors = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].first, item[1].last, item[0])):
        if tensor.first != end:
            begins = f"begins at byte {tensor.first - start}, but should begin at byte {end - start}"
            raise file_error(path, f"tensor {name!r} {begins}.")
        end = tensor.last
    if end != len(data):
        raise file_error(
            path, f"the file has {len(data):,} bytes, but its header describes {end:,}: truncated or damaged."
        )
    return TensorHeader(tensors, metadata)


def _header(path: str | os.PathLike[str], data: bytes) -> tuple[JsonObject, int]:
    if len(data) < 8:
        raise file_error(path, f"{len(data)} bytes are too few for a safetensors file: empty or truncated.")
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES or 8 + size > len(data):
        pickled = data[:2] == b"PK" or (data[0] == 0x80 and data[1] <= 5)  # torch's zip format, or any pickle protocol
        kind = "a pickle, which is never loaded" if pickled else "damaged"
        raise file_error(path, f"not a safetensors file (it claims a header of {size:,} bytes); it may be {kind}.")
    if data.count(b":", 8, 8 + size) > 4 * MAX_TENSORS + 10_000:  # a tensor needs four colons; counting is fast
        raise file_error(path, f"the header names too many tensors; at most {MAX_TENSORS:,} are allowed.")
    try:
        header = parse_json(data[8 : 8 + size])
    except (ValueError, RecursionError) as cause:
        raise file_error(path, f"the header is not valid JSON ({cause}).") from None
    if not isinstance(header, dict):
        raise file_error(path, "the header is not a JSON object.")
    return header, 8 + size


def _stored(path: str | os.PathLike[str], name: str, value: JsonValue, start: int) -> StoredTensor:
    entry = value if isinstance(value, dict) else {}
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [first, last, *shape]
    except (TypeError, KeyError, ValueError):
        raise file_error(path, f"the header's entry for {name!r} does not describe a tensor.") from None
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise file_error(path, f"the shape or offsets of tensor {name!r} contain a value that is not an integer >= 0.")
    sizes = ITEM_BYTES if ".lora_" in name else {**ITEM_BYTES, **WHOLE_BYTES}
    if dtype not in sizes:
        raise file_error(path, f"tensor {name!r} has dtype {dtype}; supported dtypes are {', '.join(sizes)}.")
    if last - first != sizes[dtype] * math.prod(shape):
        raise file_error(path, f"tensor {name!r} has {last - first} bytes, which does not match its shape {shape}.")
    return StoredTensor(dtype, tuple(shape), start + first, start + last)
