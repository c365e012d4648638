"""Keep the tokens of data in files, so that the next run on the same data maps them into memory.

An entry is a directory whose name is a key of `lorakit.caches.TOKENS`, which lists everything that the tokens depend
on. It contains the encoded rows as buffers and a sealed manifest with their sizes, types and hashes, the counts and the
sources. Entries that were not used for the longest time are removed if all entries together exceed a limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lorakit.caches import TOKENS, remove_unused
from lorakit.data.encoding import Encoded, Sequence, Sequences
from lorakit.data.report import DataReport, Report
from lorakit.data.stored import AnyRecords, StoredRecords
from lorakit.durable import JsonObject, JsonValue, is_sealed, read_json, sealed, sha256_file, write_bytes, write_json
from lorakit.durable_folders import publish_directory
from lorakit.errors import LorakitError

LEAST_BYTES = 1 << 20
"""Minimum size of the tokens in bytes for which an entry is written."""

MOST_BYTES = 20 << 30
"""Maximum total size of all entries in bytes."""

_MANIFEST, _RECORDS = "manifest.json", "record_of"
_MAX_MANIFEST_BYTES = 64 << 20


Buffers: TypeAlias = Mapping[str, memoryview]
"""Name of a file of an entry -> its content, with the type of its numbers."""


@dataclass(frozen=True)
class Form:
    """A way of storing encoded rows in an entry.

    Attributes:
        buffers: Function that returns rows as buffers.
        sequences: Function that returns the rows, given read-only buffers; a KeyError if one is missing.
        report: Class of the counts.
    """

    buffers: Callable[[Any], Buffers]
    sequences: Callable[[Buffers], Many[Sequence]]
    report: type[Report]


class TokenCache:
    """A directory of tokenized data, created when the first entry is written, with a limit of `most_bytes`.

    `inputs` are "reading", "tokenizer", "template" and "code" of `TOKENS`.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, JsonValue],
        say: Callable[[str], None],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._folder = folder
        self._inputs = dict(inputs)
        self._say = say
        self._most_bytes = most_bytes

    def fetch(self, records: AnyRecords, encoding: Many[JsonValue], make: Callable[[], Encoded], form: Form) -> Encoded:
        """Return encoded rows from an entry if there is one, or else encode them and write the entry.

        A damaged entry, or one that cannot be written, is reported in a message and is not an error.
        """
        if not isinstance(records, StoredRecords):
            return make()
        key = TOKENS.key(records=records.identity(), notes=records.notes, encoding=list(encoding), **self._inputs)
        entry = self._folder / key
        encoded = self._read(entry, form)
        if encoded is None:
            encoded = make()
            values = {"report": asdict(encoded.report), "sources": [list(pair) for pair in encoded.sources]}
            self._write(entry, {**form.buffers(encoded.sequences), _RECORDS: memoryview(encoded.record_of)}, values)
        return encoded

    def _read(self, entry: Path, form: Form) -> Encoded | None:
        if not entry.is_dir():
            return None
        with contextlib.suppress(OSError):  # a cache that can only be read
            os.utime(entry)  # before it is read: `remove_unused` leaves it
        try:
            maps, values = _loaded(entry)
            sources = tuple((str(source), int(count)) for source, count in values["sources"])
            return Encoded(form.sequences(maps), form.report(**values["report"]), maps[_RECORDS], sources)
        except (LorakitError, OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            self._say(f"{entry}: the cached tokens are damaged ({_line(cause)}), so the data is tokenized again.")
            return None

    def _write(self, entry: Path, buffers: Buffers, values: JsonObject) -> None:
        size = sum(buffer.nbytes for buffer in buffers.values())
        if size < LEAST_BYTES or size > self._most_bytes:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_unused(self._folder, size, self._most_bytes)
            if shutil.disk_usage(self._folder).free < 2 * size:
                self._say(f"{self._folder}: too little free space, so the tokens are not kept for later runs.")
                return
            with publish_directory(entry, replace=True) as temporary:
                for name, buffer in buffers.items():
                    write_bytes(temporary / name, buffer.cast("B"))
                files = {
                    name: {"type": buffer.format, "bytes": buffer.nbytes, "sha256": sha256_file(temporary / name)}
                    for name, buffer in buffers.items()
                }
                write_json(temporary / _MANIFEST, sealed({"format": TOKENS.format, "files": files, "values": values}))
        except (LorakitError, OSError) as cause:
            self._say(f"The tokens are not kept for later runs: {_line(cause)}")


def _loaded(entry: Path) -> tuple[Buffers, Mapping[str, Any]]:
    """Read and verify an entry, and return its buffers and its values.

    Raises:
        LorakitError: The manifest cannot be read.
        OSError: A file cannot be read.
        ValueError: A file or the manifest does not have the recorded hash.
        KeyError: The manifest is incomplete.
        TypeError, AttributeError: The manifest has values of other types.
    """
    manifest = read_json(entry / _MANIFEST, _MAX_MANIFEST_BYTES)
    if not isinstance(manifest, dict) or not is_sealed(manifest) or manifest["format"] != TOKENS.format:
        raise ValueError("the manifest is not valid")
    maps = dict[str, memoryview]()
    for name, about in manifest["files"].items():
        path, kind = entry / name, np.dtype(about["type"])
        if path.stat().st_size != about["bytes"] or sha256_file(path) != about["sha256"]:
            raise ValueError(f"{name} has another size or hash than recorded")
        maps[name] = (np.memmap(path, kind, "r") if about["bytes"] else np.empty(0, kind)).data  # no map is empty
    return maps, manifest["values"]


TEXT = Form(Sequences.buffers, lambda maps: Sequences.of(maps["ids"], maps["trained"], maps["ends"]), DataReport)
"""How the rows of causal language modeling are stored."""


def _line(cause: Exception) -> str:
    return " ".join(str(cause).split())
