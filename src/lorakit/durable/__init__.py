"""Crash-safe writing and verified reading; the only package that opens files for writing.

After a crash either the old or the new content exists, never a part: of a file (`files.py`) or of a directory
(`folders.py`). Uses only the standard library.
"""

from lorakit.durable.files import (
    SEAL,
    TEMPORARY,
    JsonObject,
    is_sealed,
    json_bytes,
    parse_json,
    read_bytes,
    read_json,
    sealed,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
)
from lorakit.durable.folders import publish_directory, replace_files, replace_in_order, sweep

__all__ = [
    "SEAL",
    "TEMPORARY",
    "JsonObject",
    "is_sealed",
    "json_bytes",
    "parse_json",
    "publish_directory",
    "read_bytes",
    "read_json",
    "replace_files",
    "replace_in_order",
    "sealed",
    "sha256_bytes",
    "sha256_file",
    "sweep",
    "write_bytes",
    "write_json",
    "write_text",
]
