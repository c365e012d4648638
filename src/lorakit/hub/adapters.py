"""Adapters that live on a hub: fetched into the hub's own cache, only when a hub id was given."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import ModelError
from lorakit.hub.sources import offline

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")
"""What is fetched; nothing that could hold code."""


def adapter_from_hub(repository: str, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The local folder of an adapter on the hub.

    Args:
        repository: Its id, "owner/name".
        revision: Branch, tag or commit.
        subfolder: Folder of the adapter inside the repository.

    Returns:
        The repository's folder in the hub's cache, with the adapter's files.

    Raises:
        ModelError: There is no such repository, or it cannot be reached.
    """
    import huggingface_hub

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in ADAPTER_FILES]
    variable = offline()
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=variable is not None
        )
    except Exception as cause:  # the hub's client changes its transport, and with it what it raises
        where = f"the hub's cache (the network is off: {variable} is set)" if variable else "the hub"
        raise ModelError(
            f"{repository!r} is no folder here, and {where} does not give it ({type(cause).__name__}). Check the name, "
            "or give a folder."
        ) from cause
    return Path(folder)
