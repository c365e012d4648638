"""Read configs of any PEFT version, and reject those that request unsupported features.

`check_built` runs when a config is used; `read_config` reads one tolerantly.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.config.file import read_values
from lorakit.config.lora import LoraConfig
from lorakit.config.types import CONFIG_FILE, PeftType
from lorakit.errors import AdapterFileError, ConfigError, NotYetSupported

NOT_BUILT: Mapping[str, Any] = {
    "megatron_config": None,
    "velora_config": None,
    "use_qalora": False,
    "monteclora_config": None,
    "arrow_config": None,
}
"""Fields that are not supported -> the value that leaves them off."""

ARITHMETIC = ("use_", "init_", "lora_", "target_", "rank_", "alpha_", "scal")
"""Prefixes of field names that suggest a change of the computation."""


def check_built(config: LoraConfig) -> None:
    """Reject a config with unsupported features, or with unknown fields that seem to change the computation.

    An unknown field is harmless if its value is null, false, zero or empty. With another value it is rejected if its
    name suggests arithmetic: it ends in "_config" or starts like PEFT's own such fields (`ARITHMETIC`). Other unknown
    fields are ignored, and `read_config` reports them.

    Args:
        config: A config about to be used.

    Raises:
        NotYetSupported: The config uses an unsupported feature; the message names the field.
    """
    for name, neutral in NOT_BUILT.items():
        value = getattr(config, name)
        if value is not None and value != neutral:
            raise NotYetSupported(f"{name} is {value!r}: not supported yet; use {neutral!r}.", field=name)
    for name, value in config.unknown.items():
        if value and (name.endswith("_config") or name.startswith(ARITHMETIC)):
            raise NotYetSupported(
                f"{name} is {value!r}: an unknown field of another PEFT version that seems to change the computation. "
                "Remove it from the config if it does not.",
                field=name,
            )


_WITHOUT_MEANING = frozenset({"megatron_core", "qalora_group_size", "runtime_config"})


def read_config(folder: str | os.PathLike[str]) -> tuple[LoraConfig, list[str]]:
    """Read a config that lorakit or any version of PEFT wrote.

    Args:
        folder: A directory with `adapter_config.json`, or that file.

    Returns:
        The config, and the unknown keys of the file; they are kept in `config.unknown`.

    Raises:
        AdapterFileError: The file is missing, not JSON, of another method, or has a value that is not allowed.
        NotYetSupported: The file uses an unsupported feature, so its weights would be misread.
    """
    path = Path(folder)
    if not path.exists():
        raise AdapterFileError(
            f"{path}: directory not found; an adapter is a directory with {CONFIG_FILE}.", where=path
        )
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.exists():
        raise AdapterFileError(f"{path.parent}: no {CONFIG_FILE}, so this is not an adapter.", where=path.parent)
    values = read_values(path)
    method = values.get("peft_type", PeftType.LORA.value)
    if method != PeftType.LORA.value:
        raise AdapterFileError(
            f"{path}: peft_type is {method!r}; only LORA adapters are supported.",
            what=method,
            where=path,
            field="peft_type",
            allowed=(PeftType.LORA.value,),
        )
    known = {f.name for f in dataclasses.fields(LoraConfig)} - _WITHOUT_MEANING
    unknown = {key: value for key, value in values.items() if key not in known | _WITHOUT_MEANING}
    try:
        config = LoraConfig(**{key: value for key, value in values.items() if key in known})
        config.unknown = unknown
        check_built(config)
    except (ConfigError, NotYetSupported) as cause:
        kind = AdapterFileError if isinstance(cause, ConfigError) else NotYetSupported
        raise kind(f"{path}: {cause}", **{**cause.fields, "where": path}) from None
    return config, sorted(unknown)
