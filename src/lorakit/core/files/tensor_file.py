"""Read and write safetensors files; a file is checked completely before tensors are created.

The checks cover the header: size, number of tensors, unique names, dtypes, and that the tensors fill the file exactly.
Files are never memory-mapped, so that later changes have no effect.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from lorakit.durable import JsonObject, JsonValue, parse_json, read_bytes, sha256_bytes
from lorakit.errors import AdapterFileError

MAX_FILE_BYTES = 64 << 30
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 100_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Supported dtypes of factors on disk and their sizes in bytes; converting any other dtype would corrupt values."""

WHOLE_BYTES = {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""Additional dtypes supported for buffers in saved modules, such as a batch norm's batch counter."""


@dataclass(frozen=True)
class TensorFile:
    """The contents of a safetensors file.

    Attributes:
        tensors: Name -> tensor (…) on the CPU.
        metadata: The strings in the header's `__metadata__`.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str
    size_bytes: int


def file_error(path: str | os.PathLike[str], problem: str) -> AdapterFileError:
    """Return the error for a file or directory that cannot be used; the message gives the path and the problem."""
    return AdapterFileError(f"{path}: {problem}", where=path)


def encode(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Encode tensors, on any device, as a safetensors file; the same content always gives the same bytes."""
    copies = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    return _in_order(safetensors.torch.save(copies, metadata))


def _in_order(data: bytes) -> bytes:
    """Return the file's bytes with the metadata sorted, because safetensors can write metadata in any order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Read an adapter's safetensors file; an AdapterFileError says what is missing or damaged, and where."""
    data = read_bytes(path, MAX_FILE_BYTES)
    header, start = _header(path, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise file_error(path, "the header's metadata is not a JSON object of strings.")
    if len(header) > MAX_TENSORS:
        raise file_error(path, f"the header names {len(header):,} tensors; at most {MAX_TENSORS:,} are allowed.")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            raise file_error(path, f"tensor {name!r} begins at byte {first}, but should begin at byte {end}.")
        end = last
    if start + end != len(data):
        raise file_error(
            path, f"the file has {len(data):,} bytes, but its header describes {start + end:,}: truncated or damaged."
        )
    return TensorFile(safetensors.torch.load(data), metadata, sha256_bytes(data), len(data))


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


def _span(path: str | os.PathLike[str], name: str, value: JsonValue) -> tuple[int, int, str]:
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
    return first, last, name
