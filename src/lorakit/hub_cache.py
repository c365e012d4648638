"""Download adapters from the Hugging Face Hub to the local cache; if network access is disabled, use only the cache.

This module is separate from `lorakit.hub` so that `lorakit.config` can use it to read a config by Hub id.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import ModelError

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables that forbid network access in the Hugging Face libraries."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json", "lorakit_initial.safetensors")
"""Names of the files to download; none of their formats can contain code."""


def offline(*more: str) -> str | None:
    """Return the name of the environment variable that forbids network access, or None if access is allowed.

    Args:
        more: Names of variables to check besides `OFFLINE_VARIABLES`.
    """
    for name in (*OFFLINE_VARIABLES, *more):
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
            return name
    return None


def adapter_from_hub(
    repository: str, *, revision: str | None = None, subfolder: str | None = None, also: Sequence[str] = ()
) -> Path:
    """Return the local folder of an adapter's Hub repository, after downloading any files that are not cached.

    Args:
        repository: Hub id of the repository, such as "owner/name".
        revision: Branch, tag or commit.
        subfolder: The adapter's folder in the repository.
        also: Glob patterns of other files to download, such as those of the tokenizer.

    Returns:
        The repository's folder in the local cache; if `subfolder` is given, the adapter's files are in that subfolder.

    Raises:
        ModelError: The repository was not found or cannot be reached.
    """
    import huggingface_hub

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in (*ADAPTER_FILES, *also)]
    variable = offline()
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=variable is not None
        )
    except Exception as cause:  # the Hub client's exception types depend on its HTTP library
        where = f"in the Hub's cache (network access is off: {variable} is set)" if variable else "on the Hub"
        raise ModelError(
            f"{repository!r} is not a directory and was not found {where} ({type(cause).__name__}). Check the name, "
            "or pass a directory.",
            what=repository,
        ) from cause
    return Path(folder)
