"""The one place that opens files for writing, and the readers that verify.

After a crash the old content or the new is there, never a part: of a file (`files.py`) or of a folder (`folders.py`).
Only the standard library is used.
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
