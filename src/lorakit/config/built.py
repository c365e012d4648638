"""What a config may ask for that lorakit does not build: accepted as a config, refused by name where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.config.lora import LoraConfig
from lorakit.errors import NotYetSupported

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
            raise NotYetSupported(f"{name} is {value!r}: this is not built yet. Leave it at {neutral!r}.")
    for name, value in config.unknown.items():
        if value and (name.endswith("_config") or name.startswith(ARITHMETIC)):
            raise NotYetSupported(
                f"{name} is {value!r}: a field of another version of PEFT that seems to change what is computed, and "
                f"is not known here. If it does not, take it out of the config."
            )
