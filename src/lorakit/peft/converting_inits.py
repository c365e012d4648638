"""PEFT's two ways to write an adapter whose init moved the base: as it is trained, or converted to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit import core
from lorakit.core.files.adapter_folder import read_adapter
from lorakit.core.files.saved_form import converted_form, saved_form
from lorakit.core.files.saving import save_form
from lorakit.core.layering.sitemap import layers
from lorakit.errors import ConfigError, warn_caller
from lorakit.peft.placeholders import PeftWarning
from lorakit.peft.state_dicts import flat_factors

MOVE_THE_BASE = ("pissa", "corda", "olora", "lora_ga")


def save(
    model: Any,
    folder: Path,
    name: str,
    tensors: Mapping[str, Tensor] | None = None,
    initial_folder: str | PathLike[str] | None = None,
) -> core.SavedAdapter:
    """Write one adapter as PEFT does.

    Args:
        model: The wrapper.
        folder: Where.
        name: The adapter.
        tensors: Name on disk -> tensor (…) to write instead of the model's own.
        initial_folder: Where the adapter was saved before training; what is written then is plain LoRA of twice the
            rank, for the base as it was.

    Returns:
        What was written.

    Raises:
        ConfigError: PEFT's scale would not be kept by a conversion.
        AdapterError: What lies in `initial_folder` is another adapter.
    """
    user, config = model.get_base_model(), model.peft_config[name]
    flat = flat_factors(model, name, tensors)
    if flat:
        warn_caller(
            f"{', '.join(flat[:8])} {'is' if len(flat) == 1 else 'are'} flat, as DeepSpeed ZeRO-3 / FSDP shards are "
            "that were not gathered: no program can load the file. Pass the whole tensors as `state_dict`.",
            PeftWarning,
        )
    moved = any(layer.moved_by == name for _, layer in layers(user))
    if initial_folder is not None:
        if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
            raise ConfigError(
                "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
                "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`. `lorakit.core.save_adapter` "
                "writes such an adapter as plain LoRA, too."
            )
        if not str(config.init_lora_weights).lower().startswith((*MOVE_THE_BASE, "true")):
            warn_caller(
                "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA "
                "adapter to a LoRA adapter"
            )
        initial = read_adapter(initial_folder).file.tensors
        return save_form(user, folder, converted_form(user, name, initial, tensors))
    if not moved:
        return core.save_adapter(user, folder, name, tensors=tensors)
    if config.init_lora_weights is True:  # PEFT's way to save what an adapter begins with
        return save_form(user, folder, saved_form(user, name, "raw", tensors))
    warn_caller(
        f"Adapter {name!r} acts on a base that {config.init_lora_weights!r} changed, and is saved so, as PEFT does. "
        "For other programs pass `path_initial_model_for_weight_conversion`, or save it with "
        "`lorakit.core.save_adapter`."
    )
    return core.save_as_trained(user, folder, name, tensors=tensors)
