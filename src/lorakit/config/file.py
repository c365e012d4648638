"""Find `adapter_config.json` and read it as a dict of plain values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorakit.config.types import CONFIG_FILE
from lorakit.durable import read_json
from lorakit.errors import AdapterFileError
from lorakit.hub_cache import adapter_from_hub


def looks_like_a_hub_id(name: str | os.PathLike[str]) -> bool:
    """Return whether the name of a folder that does not exist may be a Hub id, "owner/name"."""
    word = str(name)
    return word.count("/") == 1 and not word.startswith((".", "/", "~")) and CONFIG_FILE not in word


def config_file(name: str | os.PathLike[str], subfolder: str | None = None, revision: str | None = None) -> Path:
    """Return the path of an adapter's config.

    Args:
        name: A folder or a Hub id.
        subfolder: A folder inside it.
        revision: Revision on the Hub.

    Raises:
        AdapterFileError: The config file was not found.
    """
    folder = Path(name) / subfolder if subfolder else Path(name)
    path = folder / CONFIG_FILE
    if path.is_file():
        return path
    if Path(name).exists() or not looks_like_a_hub_id(name):
        raise AdapterFileError(
            f"Can't find '{CONFIG_FILE}' at '{folder}': an adapter is a directory with that file.", where=folder
        )
    try:
        found = adapter_from_hub(str(name), revision=revision, subfolder=subfolder)
    except ValueError as cause:
        raise AdapterFileError(f"Can't find '{CONFIG_FILE}' at '{name}': {cause}") from cause
    return found / (subfolder or "") / CONFIG_FILE


def read_values(path: Path) -> dict[str, Any]:
    """Return the contents of a config file.

    Raises:
        AdapterFileError: The file is missing or not a JSON object.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{path}: contains a {type(values).__name__}; expected an object with the config's fields.",
            where=path,
        )
    return values
