"""Finding `adapter_config.json`, and reading it as a table of plain values."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from lorakit.config.types import CONFIG_FILE
from lorakit.durable import read_json
from lorakit.errors import AdapterFileError


def looks_like_a_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name that is no folder here may be one on a hub: "owner/name"."""
    word = str(name)
    return word.count("/") == 1 and not word.startswith((".", "/", "~")) and CONFIG_FILE not in word


def config_file(name: str | os.PathLike[str], subfolder: str | None = None, revision: str | None = None) -> Path:
    """Where the config of an adapter lies.

    Args:
        name: A folder, or a hub id.
        subfolder: A folder inside it.
        revision: Revision on the hub.

    Raises:
        AdapterFileError: There is none.
    """
    folder = Path(name) / subfolder if subfolder else Path(name)
    path = folder / CONFIG_FILE
    if path.is_file():
        return path
    if Path(name).exists() or not looks_like_a_hub_id(name):
        raise AdapterFileError(
            f"Can't find '{CONFIG_FILE}' at '{folder}': an adapter is a folder with that file.", where=folder
        )
    try:  # the hub's door lies above this floor: it is asked by name, and only when a hub id was given
        found = import_module("lorakit.hub").adapter_from_hub(str(name), revision=revision, subfolder=subfolder)
    except ValueError as cause:
        raise AdapterFileError(f"Can't find '{CONFIG_FILE}' at '{name}': {cause}") from cause
    return Path(found) / (subfolder or "") / CONFIG_FILE


def read_values(path: Path) -> dict[str, Any]:
    """A config file as a table.

    Raises:
        AdapterFileError: The file is missing, not JSON, or no object.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{path}: holds a {type(values).__name__}; an object with the config's fields was expected.",
            where=path,
        )
    return values
