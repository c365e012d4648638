"""What a config may ask for that lorakit does not build: accepted as a config, refused by name where it is used.

`read_config`: a config that any version of PEFT wrote, tolerantly, for a caller that is about to use it.
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
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}
"""Fields that are known but not built, each with the value that asks for nothing."""

ARITHMETIC = ("use_", "init_", "lora_", "target_", "rank_", "alpha_", "scal")
"""Beginnings of the names of fields that say what is computed."""


def check_built(config: LoraConfig) -> None:
    """Refuse a config that asks for what is not built, or that a newer PEFT wrote for arithmetic unknown here.

    A key that is unknown here is harmless where its value asks for nothing (null, false, zero, empty). With
    another value it is refused if its name speaks of arithmetic: it ends in "_config", or begins as PEFT's own
    such fields do (`ARITHMETIC`). Anything else is passed over, and `read_config` names it.

    Args:
        config: A config that is about to be used.

    Raises:
        NotYetSupported: It asks for what is not built; the message names the field.
    """
    for name, neutral in NOT_BUILT.items():
        value = getattr(config, name)
        if value is not None and value != neutral:
            raise NotYetSupported(f"{name} is {value!r}: this is not built yet. Leave it at {neutral!r}.", field=name)
    for name, value in config.unknown.items():
        if value and (name.endswith("_config") or name.startswith(ARITHMETIC)):
            raise NotYetSupported(
                f"{name} is {value!r}: a field of another version of PEFT that seems to change what is computed, and "
                f"is not known here. If it does not, take it out of the config.",
                field=name,
            )


_WITHOUT_MEANING = frozenset({"megatron_core", "qalora_group_size", "runtime_config"})


def read_config(folder: str | os.PathLike[str]) -> tuple[LoraConfig, list[str]]:
    """Read a config that any version of PEFT, or lorakit, wrote.

    Args:
        folder: A folder with `adapter_config.json`, or that file.

    Returns:
        The config, and the names of keys in the file that are not known here; they are kept in `config.unknown`.

    Raises:
        AdapterFileError: The file is missing, not JSON, of another method, or a value is not allowed.
        NotYetSupported: The file asks for what is not built yet, so its weights would be misread.
    """
    path = Path(folder)
    if not path.exists():
        raise AdapterFileError(
            f"{path}: there is no such folder; an adapter is a folder with {CONFIG_FILE}.", where=path
        )
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.exists():
        raise AdapterFileError(
            f"{path.parent}: there is no {CONFIG_FILE}, so this is not an adapter.", where=path.parent
        )
    values = read_values(path)
    method = values.get("peft_type", PeftType.LORA.value)
    if method != PeftType.LORA.value:
        raise AdapterFileError(
            f"{path}: peft_type is {method!r}; only LORA adapters can be used here.",
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
