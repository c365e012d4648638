"""`lorakit list`: list the adapters and the runs in a directory."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console, early
from lorakit.config import CONFIG_FILE, SIDECAR_FILE, read_config
from lorakit.durable import as_object, read_json
from lorakit.errors import AdapterFileError, LorakitError, RunError
from lorakit.report import RUN_FILE, read_metrics

MAX_SIDECAR_BYTES = 64 << 20
ADAPTER, FINISHED, RECORDS = "adapter", ("finished", "stopped early", None), (CONFIG_FILE, RUN_FILE)

LEAST_RISE = 1.0
"""Smallest rise of the loss, in nats per token, that is called divergence; it must also be half of the loss before."""

SORTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "name": lambda one: one["adapter"],
    "date": lambda one: one["date"],
    "base": lambda one: one.get("base_model"),
    "rate": lambda one: one.get("learning_rate"),
    "steps": lambda one: one.get("steps"),
    "loss": lambda one: one.get("eval_loss"),
}
"""Value of `--sort` -> what is compared; entries without a value are last."""


def run(
    folder: Annotated[Path, Parameter(help="Directory with adapters or runs; directories in it are searched too.")],
    *,
    sort: Annotated[str, Parameter(help=f"Order of the lines: {', '.join(SORTS)}.")] = "name",
    json: console.JsonFlag = False,
) -> None:
    """List the adapters in a directory: base model, learning rate, steps, data, and loss of the base and the adapter.

    Runs without an adapter are listed with their status, such as failed or interrupted; a run that was killed before
    its first step leaves an empty directory. An adapter is marked as diverged if its loss is far above that before
    training. Checkpoints of runs are left out. Weights are not read; `lorakit inspect` verifies them. --json adds task,
    rank, size and date.

    Raises:
        AdapterFileError: The directory does not exist, or contains neither adapters nor runs.
    """
    early.check_choice("sort", sort, tuple(SORTS))
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: directory not found.", where=folder)
    entries = [_described(folder, path) for path in sorted(set(_folders(folder)), key=_title)]
    if not entries:
        text = f"{folder}: no adapters found; an adapter's directory contains {CONFIG_FILE}."
        raise AdapterFileError(text, where=folder)
    entries.sort(key=lambda one: (SORTS[sort](one) is None, SORTS[sort](one) or 0))
    if json:
        console.emit_json(entries)
        return
    head = ["adapter", "base", "rate", "steps", "data", "loss: base → adapter"]
    console.say(console.table(head, [_row(one) for one in entries]))
    for one in entries:
        if reason := one.get("error") or one.get("failure"):
            console.warning(f"{one['adapter']}: {reason}")


def _folders(folder: Path) -> Iterator[Path]:
    """Yield the directories that contain an adapter, or a run without one, or nothing; not checkpoints."""
    for path, folders, names in os.walk(folder):
        here = Path(path)
        is_empty = not folders and not names and not any((here.parent / name).is_file() for name in RECORDS)
        folders[:] = [name for name in folders if not name.startswith((".", "checkpoint-", "adapter-only-"))]
        has_run = RUN_FILE in names and not (here / ADAPTER / CONFIG_FILE).is_file()
        if CONFIG_FILE in names or has_run or (is_empty and here != folder):
            yield here


def _title(folder: Path) -> Path:
    """Return the directory under which an adapter is listed: of a run's adapter, that of the run."""
    return folder.parent if folder.name == ADAPTER and folder.parent.name else folder


def _described(root: Path, folder: Path) -> dict[str, Any]:
    """Return what the files of an adapter or a run say about it; "error" holds the reason if they cannot be read."""
    record = next((folder / name for name in RECORDS if (folder / name).is_file()), folder)
    is_adapter, of = record.name == CONFIG_FILE, folder.parent if folder.name == ADAPTER else folder
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    changed = datetime.fromtimestamp(record.stat().st_mtime).astimezone()
    found: dict[str, Any] = {
        "adapter": str(folder.relative_to(root)),
        "size_bytes": sum(sizes),
        "date": changed.isoformat(timespec="seconds"),
    }
    try:
        own = adapter_facts(folder) if is_adapter else {}
        of_run = _run(of) if not is_adapter or of != folder else {}
        found |= {"data": own.pop("data", []), **of_run, **own}
        return {**found, **_divergence(found, of)}
    except (LorakitError, OSError, ValueError) as cause:
        return {**found, "error": " ".join(str(cause).split())}


def _run(folder: Path) -> dict[str, Any]:
    """Return what the record of a run says, or an empty dict without a record."""
    path = folder / RUN_FILE
    record = as_object(read_json(path, MAX_SIDECAR_BYTES)) if path.is_file() else {}
    settings, resolved, result = (as_object(record.get(name)) for name in ("settings", "resolved", "result"))
    if not any(folder.iterdir()):
        return {"status": "running" if _is_active(folder) else "not started"}
    if not record:
        return {}
    return {
        "base_model": resolved.get("base") or settings.get("model"),
        "learning_rate": settings.get("learning_rate"),
        "data": settings.get("data") or [],
        "steps": result.get("steps"),
        "status": "interrupted"
        if record.get("status") == "running" and not _is_active(folder)
        else record.get("status"),
        **({"failure": message} if (message := as_object(record.get("error")).get("message")) else {}),
    }


def _divergence(one: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the status and the reason if the loss of a finished run is far above that before training."""
    losses = [one.get("base_loss"), one.get("eval_loss")]
    if losses[1] is None:  # no data was held out; losses of single steps differ, so the lowest of the last ones counts
        first, *rest = [row["loss"] for row in read_metrics(folder).train] or [None]
        losses = [first, min(rest[-10:], default=None)]
    before, after = (loss if isinstance(loss, int | float) else math.nan for loss in losses)
    if one.get("status") not in FINISHED or not after > before + max(LEAST_RISE, before / 2):
        return {}
    return {"status": "diverged", "failure": f"the loss is {after:.4f}, and was {before:.4f} before training"}


def _is_active(folder: Path) -> bool:
    """Return whether a process is training in a run directory."""
    from lorakit.train.files.run_folder import check_unlocked

    try:
        check_unlocked(folder)
    except RunError:
        return True
    return False


def adapter_facts(folder: Path) -> dict[str, Any]:
    """Return what an adapter's config and `lorakit.json` say; values that are unknown are left out, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `lorakit inspect` shows them
        config, _ = read_config(folder)
    sidecar = folder / SIDECAR_FILE
    facts = as_object(read_json(sidecar, MAX_SIDECAR_BYTES)) if sidecar.is_file() else {}
    training = as_object(facts.get("training"))
    task, start = config.task_type, as_object(training.get("from_adapter"))
    known = {
        "base_model": facts.get("base_name") or config.base_model_name_or_path,
        "steps": training.get("step"),
        "data": [*as_object(training.get("data_sha256"))],
    }
    return {
        **{name: value for name, value in known.items() if value},
        "task": None if task is None else str(getattr(task, "value", task)),
        "r": config.r,
        "base_loss": start.get("eval_loss") if start else training.get("base_eval_loss"),
        "eval_loss": training.get("eval_loss"),
    }


def _row(one: Mapping[str, Any]) -> list[str]:
    """Return the cells of a line of at most 80 columns; long names lose their beginning."""
    name, rate, data = str(_title(Path(one["adapter"]))), one.get("learning_rate"), one.get("data") or []
    more = f" +{len(data) - 1}" if len(data) > 1 else ""
    losses, state = [one.get(key) for key in ("base_loss", "eval_loss")], one.get("status")
    measured = " → ".join(f"{loss:.4f}" if isinstance(loss, int | float) else "–" for loss in losses)
    parts = [measured] if losses != [None, None] else []
    shown = [*parts, *([] if state in FINISHED else [f"({state})" if parts else str(state)])]
    return [
        _end(name, 20),
        _end(Path(str(one.get("base_model") or "")).name, 14),
        f"{rate:g}" if isinstance(rate, int | float) else "",
        str(one.get("steps") or ""),
        _end(Path(str(data[0])).name, 13 - len(more)) + more if data else "",
        " ".join(shown),
    ]


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"
