"""`adapter-only-<step>/`: the adapter of a step whose checkpoint did not fit on the disk.

It loads as any adapter; without optimizer and position no run resumes from it. The newest and the best are kept.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from lorakit import durable
from lorakit.errors import DiskError
from lorakit.train import checkpoint

_NAME = re.compile(r"adapter-only-(\d{1,12})")


def place(folder: Path, step: int) -> Path:
    """Return the folder of a step's adapter, which may not exist."""
    return folder / f"adapter-only-{step}"


def step_of(path: Path) -> int:
    """Return the step that a folder's name gives, or -1."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def saved(folder: Path) -> list[Path]:
    """Return the adapters that are there, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()), key=step_of)


def save(folder: Path, step: int, best_step: int | None, write_adapter: Callable[[Path], object]) -> Path:
    """Write the adapter of a step, whole or not at all, and then remove the older ones but for the best.

    Args:
        folder: The run directory.
        step: The step.
        best_step: The best step so far, or None.
        write_adapter: Writes the adapter's files into the folder that it is given.

    Returns:
        The adapter's folder.

    Raises:
        DiskError: It cannot be written; the older ones are unchanged.
    """
    final = place(folder, step)
    try:
        with durable.publish_directory(final, replace=True) as temporary:
            write_adapter(temporary)
    except DiskError as cause:
        reason = getattr(cause.__cause__, "strerror", None) or str(cause)
        raise DiskError(f"{final}: cannot be written ({reason}).", where=final) from cause
    prune(folder, step, best_step)
    return final


def prune(folder: Path, step: int, best_step: int | None) -> None:
    """Remove the adapters of steps before one, but for the best.

    Args:
        folder: The run directory.
        step: The step.
        best_step: The best step so far, or None.
    """
    for path in saved(folder):
        if step_of(path) < step and step_of(path) != best_step:
            shutil.rmtree(path, ignore_errors=True)


def account(folder: Path) -> str:
    """Return in words what a run directory holds: the newest good checkpoint, and adapters alone."""
    good = checkpoint.newest_good(folder).path
    found = [] if good is None else [f"{good.name} (complete, for --resume)"]
    found += [f"{path.name} (the adapter alone)" for path in saved(folder)]
    return f"Saved in {folder}: {', '.join(found) or 'no checkpoint and no adapter'}."
