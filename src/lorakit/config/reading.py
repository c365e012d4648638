"""`read_config`: a config that any version of PEFT wrote, tolerantly, for a caller that is about to use it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from lorakit.config.built import check_built
from lorakit.config.locating import read_values
from lorakit.config.lora import LoraConfig
from lorakit.config.words import CONFIG_FILE, PeftType
from lorakit.errors import AdapterFileError, ConfigError, NotYetSupported

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
        raise AdapterFileError(f"{path}: there is no such folder; an adapter is a folder with {CONFIG_FILE}.")
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.exists():
        raise AdapterFileError(f"{path.parent}: there is no {CONFIG_FILE}, so this is not an adapter.")
    values = read_values(path)
    method = values.get("peft_type", PeftType.LORA.value)
    if method != PeftType.LORA.value:
        raise AdapterFileError(f"{path}: peft_type is {method!r}; only LORA adapters can be used here.")
    known = {f.name for f in dataclasses.fields(LoraConfig)} - _WITHOUT_MEANING
    unknown = {key: value for key, value in values.items() if key not in known | _WITHOUT_MEANING}
    try:
        config = LoraConfig(**{key: value for key, value in values.items() if key in known})
        config.unknown = unknown
        check_built(config)
    except (ConfigError, NotYetSupported) as cause:
        kind = AdapterFileError if isinstance(cause, ConfigError) else NotYetSupported
        raise kind(f"{path}: {cause}") from None
    return config, sorted(unknown)
