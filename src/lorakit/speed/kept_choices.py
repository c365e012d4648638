"""The answers of `lorakit.speed.choosing` on disk: one file for all machines that share a cache folder.

A file that is missing, damaged or not to be written costs a measurement and nothing else. Of two processes that write
at once, one may lose what it measured; the file is always whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit import __version__, durable
from lorakit.errors import AdapterFileError, DiskError
from lorakit.machine import cache_directory, this_machine
from lorakit.ops.kernels import compiled

FILE = "choices.json"
FORMAT = 1


def read(folder: Path | None = None) -> dict[str, int]:
    """What was measured on this machine, with its threads and torch.

    Args:
        folder: Where the file is; None for lorakit's cache.

    Returns:
        Name of a shape -> the way that is best; nothing where there is no such file.
    """
    try:
        path = _path(folder)
    except DiskError:
        return {}
    return _of_machine(_machines(path).get(machine()))


def keep(answers: Mapping[str, int], folder: Path | None = None) -> str:
    """Put answers beside those that stand there.

    Args:
        answers: Name of a shape -> way.
        folder: As of `read`.

    Returns:
        Why it was not possible, or "".
    """
    try:
        path = _path(folder)
        machines = _machines(path)
        machines[machine()] = {**_of_machine(machines.get(machine())), **answers}
        durable.write_json(path, {"format": FORMAT, "machines": machines})
    except DiskError as cause:
        return str(cause).removesuffix(".")
    return ""


def machine() -> str:
    """What decides how fast a way is here: processor, its instructions, threads, torch, lorakit and its kernels."""
    here, limit = this_machine(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    instructions = " ".join((*here.features, *([f"at most {limit}"] if limit else [])))
    kernels = "compiled kernels" if compiled.kernels() is not None else "no kernels"
    libraries = f"torch {torch.__version__}; lorakit {__version__}, {kernels}"
    return f"{here.cpu}; {instructions}; {torch.get_num_threads()} threads; {libraries}"


def _path(folder: Path | None) -> Path:
    return (cache_directory() if folder is None else folder) / FILE


def _machines(path: Path) -> dict[str, Any]:
    try:
        content = durable.read_json(path)
    except AdapterFileError:
        return {}
    known = isinstance(content, dict) and content.get("format") == FORMAT
    machines = content.get("machines") if known else None
    return machines if isinstance(machines, dict) else {}


def _of_machine(answers: Any) -> dict[str, int]:
    if not isinstance(answers, dict):
        return {}
    return {name: way for name, way in answers.items() if isinstance(way, int) and not isinstance(way, bool)}
