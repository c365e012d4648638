"""Where a saved adapter lies: a folder as it is, a hub id through the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

from lorakit.config import looks_like_a_hub_id


def adapter_folder(model_id: str | os.PathLike[str], subfolder: str | None, revision: str | None) -> Path:
    """The folder of an adapter: a local one as it is, a hub id through the hub's cache.

    Args:
        model_id: A folder, or a hub id.
        subfolder: A folder inside it.
        revision: Revision on the hub.

    Raises:
        AdapterFileError: There is neither.
    """
    folder = Path(model_id)
    if folder.exists() or not looks_like_a_hub_id(model_id):
        return folder / subfolder if subfolder else folder
    from lorakit.hub import adapter_from_hub

    fetched = adapter_from_hub(str(model_id), revision=revision, subfolder=subfolder)
    return fetched / subfolder if subfolder else fetched
