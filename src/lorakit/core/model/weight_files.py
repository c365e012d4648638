"""SHA-256 of the files that a base was loaded from, as far as they are known and cheap to hash.

Evidence about a base, not its identity: memory can change after loading, and one base can be saved in other files. A
hash is kept in lorakit's cache with size, modification time and inode of its file. Nothing here raises: what cannot be
found, read or kept gives no evidence.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.durable import JsonObject, read_json, sha256_file, write_json
from lorakit.errors import AdapterFileError, DiskError
from lorakit.machine import cache_directory

FILE, FORMAT, MOST_KEPT = "weight_files.json", 1, 512
"""Name of the cache's file, its format, and the number of hashes that it keeps."""

LEAST_KEPT = 1 << 20
"""Smaller files are hashed each time, which takes as long as reading the cache."""

MOST_BYTES = 1 << 30
"""Files of a base that are neither in a hub's cache under their hash nor hashed before are hashed up to this size in
all: about a second. A larger base has no evidence from files."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def weight_file_hashes(model: nn.Module) -> dict[str, str]:
    """Return SHA-256 by name of the safetensors files that a model was loaded from; empty if any is not known.

    Args:
        model: A model; its config says where it was loaded from (`name_or_path`).
    """
    try:
        return _hashes(_files_of(model))
    except (OSError, RuntimeError, ValueError):  # unreadable, no home directory, not a path
        return {}


def _files_of(model: nn.Module) -> list[Path]:
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if not isinstance(name, str) or not name:
        return []
    folder = Path(name) if Path(name).is_dir() else _snapshot(name)
    return [] if folder is None else _in_folder(folder)


def _in_folder(folder: Path) -> list[Path]:
    """Return the weight files that transformers takes from a folder."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        return []
    index = read_json(folder / _INDEX, 64 << 20)
    table = index.get("weight_map") if isinstance(index, dict) else None
    names = {name for name in table.values() if isinstance(name, str)} if isinstance(table, dict) else set()
    if any(Path(name).name != name for name in names):
        return []
    return [folder / name for name in sorted(names)]


def _snapshot(name: str) -> Path | None:
    """Return the folder of a hub's cache with a model's weights; None if there are several revisions, or none."""
    if not _HUB_ID.fullmatch(name):
        return None
    snapshots = _hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [entry for entry in snapshots.iterdir() if _in_folder(entry)] if snapshots.is_dir() else []
    return found[0] if len(found) == 1 else None


def _hub_cache() -> Path:
    own, home, shared = (os.environ.get(name) for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"))
    if own:
        return Path(own).expanduser()
    if home:
        return Path(home).expanduser() / "hub"
    return (Path(shared) if shared else Path.home() / ".cache") / "huggingface" / "hub"


def _hashes(files: list[Path]) -> dict[str, str]:
    known, unknown, fresh = {}, {}, {}
    kept = _read_kept() if files else {}
    for file in files:
        real = Path(os.path.realpath(file))
        facts = _facts(real)
        hashed = _kept_hash(kept.get(str(real)), facts)
        if _SHA256.fullmatch(real.name) and real.parent.name == "blobs":  # a hub's cache names blobs by their SHA-256
            known[file.name] = real.name
        elif hashed is not None:
            known[file.name] = hashed
        else:
            unknown[file.name] = real, facts
    if sum(facts["size"] for _, facts in unknown.values()) > MOST_BYTES:
        return {}
    for name, (real, facts) in unknown.items():
        known[name] = sha256_file(real)
        if _facts(real) != facts:
            return {}  # it changed while it was read
        if facts["size"] >= LEAST_KEPT:
            fresh[str(real)] = {**facts, "sha256": known[name]}
    if fresh:
        older = {path: entry for path, entry in kept.items() if path not in fresh}
        _keep({**older, **fresh})
    return dict(sorted(known.items()))


def _kept_hash(entry: Any, facts: dict[str, int]) -> str | None:
    """Return the hash in an entry of the cache; None if it is not sound, or the file has changed."""
    if not isinstance(entry, dict) or facts != {key: entry.get(key) for key in facts}:
        return None
    sha256 = str(entry.get("sha256"))
    return sha256 if _SHA256.fullmatch(sha256) else None


def _facts(file: Path) -> dict[str, int]:
    """Return what changes with a file's content.

    Raises:
        OSError: It is not a regular file, or cannot be asked.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{file}: not a regular file")
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _read_kept() -> JsonObject:
    try:
        content = read_json(cache_directory() / FILE, 16 << 20)
    except (AdapterFileError, OSError, RuntimeError):  # none yet, damaged, or no place for a cache
        return {}
    known = isinstance(content, dict) and content.get("format") == FORMAT
    files = content.get("files") if known else None
    return files if isinstance(files, dict) else {}


def _keep(kept: JsonObject) -> None:
    newest = dict(list(kept.items())[-MOST_KEPT:])
    try:
        write_json(cache_directory() / FILE, {"format": FORMAT, "files": newest})
    except (DiskError, OSError, RuntimeError):
        return  # hashed again next time
