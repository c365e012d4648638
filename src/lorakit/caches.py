"""The table of everything that lorakit keeps below its cache directory, with all inputs that each entry depends on.

An entry is found by a key, which hashes the cache's name, its format and the values of all inputs. Files enter keys by
their content. This module is the only one that gives paths in the cache directory.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lorakit
from lorakit.durable import TEMPORARY, JsonObject, JsonValue, is_sealed, read_json, sealed, sha256_bytes, write_json
from lorakit.errors import AdapterFileError, DiskError
from lorakit.machine import cache_directory

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "jinja2", "sentencepiece", "tiktoken"),
    *("datasets", "pyarrow", "gguf", "sentence-transformers"),
    *("bitsandbytes", "torchao", "hqq", "compressed-tensors", "triton"),
)
"""Packages whose code computes what is kept."""


STALE_SECONDS = 24 * 3600
"""Age at which an unfinished entry is left over from a killed process."""


RECENT_SECONDS = 3600
"""Age of its last use from which an entry may be removed; another process may still load one that was used later."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache.

    Attributes:
        place: Name of its file or directory in lorakit's cache directory.
        format: Format of its entries, and version of how they are computed; increased when either changes.
        inputs: Names of everything that an entry depends on.
    """

    place: str
    format: int
    inputs: tuple[str, ...]

    def path(self) -> Path:
        """Return the path of the file or directory, which need not exist."""
        return cache_directory() / self.place

    def key(self, **values: JsonValue | Mapping[str, JsonValue]) -> str:
        """Return the key of an entry, 64 hexadecimal digits, from all inputs; a TypeError for any others."""
        if values.keys() != set(self.inputs):
            raise TypeError(f"{self.place}: expected the inputs {sorted(self.inputs)}, got {sorted(values)}")
        return sha256_bytes(json.dumps([self.place, self.format, values], sort_keys=True).encode())

    def read(self, path: Path | None = None, most_bytes: int = 16 << 20) -> JsonObject:
        """Return the values in the cache's file, or in another; {} if it is missing, damaged or of another format."""
        try:
            content = read_json(self.path() if path is None else path, most_bytes)
        except (AdapterFileError, DiskError, OSError):
            return {}
        is_whole = isinstance(content, dict) and is_sealed(content) and content.get("format") == self.format
        return content if is_whole else {}

    def write(self, values: Mapping[str, Any], path: Path | None = None) -> str:
        """Write values to the cache's file, or to another; return why they could not be written, or ""."""
        try:
            write_json(self.path() if path is None else path, sealed({"format": self.format, **values}))
        except (DiskError, OSError) as cause:
            return str(cause).removesuffix(".")
        return ""


_START = (
    *("weights", "new_tensors", "config", "model_class", "attention", "adapter", "task", "rows"),
    *("environment", "machine", "code"),
)

TOKENS = Cache("tokens", 4, ("records", "notes", "reading", "encoding", "tokenizer", "template", "code"))
"""Encoded rows; see `lorakit.data.token_cache`."""

EVALUATIONS = Cache("scores", 4, (*_START, "accelerated", "int8_scales", "packed"))
"""Evaluations before the first step; see `lorakit.train.loop.score_cache`."""

INT8 = Cache("int8", 3, (*_START, "batch_tokens"))
"""Calibrations of int8 bases; see `lorakit.train.setup.run_int8`."""

AUTOTUNING = Cache("choices.json", 3, ("processor", "instructions", "threads", "kernels", "versions"))
"""Fastest kernels by shape, in one entry per machine; see `lorakit.speed.tuning`."""

FILE_HASHES = Cache("weight_files.json", 3, ("path", "device", "inode", "size", "mtime_ns", "ctime_ns"))
"""Hashes of large files; see `lorakit.file_hashes`."""

KERNELS = Cache("kernels", 2, ("source", "flags", "compiler", "instructions", "system", "define", "torch"))
"""Compiled kernels; see `lorakit.ops.kernels.building`."""

MODELS = Cache("models", 2, ("source", "model", "versions"))
"""Models of Python packages, converted; see `lorakit.hub.packaged`."""

GGUF = Cache("gguf", 1, ("source", "loader", "dtype", "versions"))
"""Models and tokenizers from GGUF files; see `lorakit.hub.converting`."""

CACHES = (TOKENS, EVALUATIONS, INT8, AUTOTUNING, FILE_HASHES, KERNELS, MODELS, GGUF)


def remove_unused(folder: Path, needed_bytes: int, most_bytes: int) -> None:
    """Remove what killed processes left, and the entries (directories) unused for longest until there is enough room.

    Entries used within the last `RECENT_SECONDS` are kept, even if there is not enough room.
    """
    entries = []
    for path in folder.iterdir():
        used = path.stat().st_mtime
        if path.name.startswith(TEMPORARY):
            if time.time() - used > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            entries.append((used, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), path))
    total = needed_bytes + sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= most_bytes:
            return
        if time.time() - path.stat().st_mtime > RECENT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def scratch_directory() -> Path:
    """Return the directory for files without names, which end with the process; it has room for a model's weights."""
    return cache_directory()


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the version of Python and lorakit, and of each of some packages, None if it is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version(), "lorakit": lorakit.__version__}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def code() -> dict[str, JsonValue]:
    """Return what identifies the code that computes results: `versions`, and a SHA-256 of lorakit's source."""
    folder = Path(lorakit.__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h"))
    source = [[path.relative_to(folder).as_posix(), sha256_bytes(path.read_bytes())] for path in files]
    return {**versions(), "source": sha256_bytes(json.dumps(source).encode())}
