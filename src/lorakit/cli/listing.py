"""`lorakit list`: list the adapters in a directory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.config import CONFIG_FILE, SIDECAR_FILE, read_config
from lorakit.durable import read_json
from lorakit.errors import AdapterFileError, LorakitError
from lorakit.tables import format_bytes

MAX_SIDECAR_BYTES = 64 << 20


def run(
    folder: Annotated[Path, Parameter(help="Directory with adapters or runs; directories in it are searched too.")],
    *,
    json: console.JsonFlag = False,
) -> None:
    """List the adapters in a directory: base model, task, rank, size, evaluation loss and date.

    Checkpoints of runs are left out. Weights are not read; `lorakit inspect` verifies them.

    Raises:
        AdapterFileError: The directory does not exist, or contains no adapters.
    """
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: directory not found.", where=folder)
    found = [_described(folder, path) for path in sorted(_adapters(folder))]
    if not found:
        text = f"{folder}: no adapters found; an adapter's directory contains {CONFIG_FILE}."
        raise AdapterFileError(text, where=folder)
    if json:
        console.emit_json(found)
        return
    head = ["adapter", "base model", "task", "r", "size", "eval loss", "date"]
    rows = [
        [
            one["adapter"],
            one.get("base_model") or "",
            one.get("task") or "",
            str(one.get("r", "")),
            format_bytes(one["size_bytes"]),
            "" if one.get("eval_loss") is None else f"{one['eval_loss']:.4f}",
            one["date"][:10],
        ]
        for one in found
    ]
    console.say(console.table(head, rows))
    for one in found:
        if "error" in one:
            console.warning(f"{one['adapter']}: {one['error']}")


def _adapters(folder: Path) -> Iterator[Path]:
    """Yield the directories that contain an adapter, except for checkpoints and temporary directories."""
    for config in folder.rglob(CONFIG_FILE):
        inside = config.parent.relative_to(folder).parts
        if not any(part.startswith((".", "checkpoint-", "adapter-only-")) for part in inside):
            yield config.parent


def _described(root: Path, folder: Path) -> dict[str, Any]:
    """Return what the files of an adapter say about it; "error" holds the reason if they cannot be read."""
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    changed = datetime.fromtimestamp((folder / CONFIG_FILE).stat().st_mtime).astimezone()
    found: dict[str, Any] = {
        "adapter": str(folder.relative_to(root)),
        "size_bytes": sum(sizes),
        "date": changed.isoformat(timespec="seconds"),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `lorakit inspect` shows them
            config, _ = read_config(folder)
        sidecar = folder / SIDECAR_FILE
        facts = read_json(sidecar, MAX_SIDECAR_BYTES) if sidecar.is_file() else {}
    except (LorakitError, OSError, ValueError) as cause:
        return {**found, "error": " ".join(str(cause).split())}
    training = facts.get("training") if isinstance(facts, dict) else None
    task = config.task_type
    return {
        **found,
        "base_model": config.base_model_name_or_path,
        "task": None if task is None else str(getattr(task, "value", task)),
        "r": config.r,
        "eval_loss": training.get("eval_loss") if isinstance(training, dict) else None,
    }
