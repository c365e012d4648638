"""Writing a model as a plain directory that `from_pretrained` of any program loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorakit.errors import DiskError, ModelError
from lorakit.hub.quiet import quiet_transformers


def save_model(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write safetensors, config, generation config and tokenizer.

    Args:
        model: A transformers model without adapters.
        folder: An existing, empty directory.
        tokenizer: A transformers tokenizer, or None.

    Raises:
        DiskError: There is no room, or the disk refuses.
        ModelError: transformers does not write this model.
    """
    from safetensors import SafetensorError

    needed_bytes = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{folder.parent}: {needed_bytes / 1e6:,.0f} MB are needed and {free_bytes / 1e6:,.0f} MB are free."
        )
    with quiet_transformers():
        try:
            model.save_pretrained(str(folder))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
        except (OSError, SafetensorError) as cause:  # a full disk comes out of the writer of safetensors as the latter
            raise DiskError(
                f"{folder.parent}: the model cannot be written ({' '.join(str(cause).split())})."
            ) from cause
        except Exception as cause:  # what a model's own code raises
            raise ModelError(
                f"transformers does not write this {type(model).__name__} ({' '.join(str(cause).split())[:240]})."
            ) from cause
    readable = (folder / "config.json").stat().st_mode
    for part in folder.glob("*.safetensors"):
        part.chmod(readable)  # the writer of safetensors makes them private, whatever the umask says
