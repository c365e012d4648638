"""`LoraConfig` and its helper types. Field defaults and the scale formula are defined only here.

Names, defaults and `adapter_config.json` follow PEFT. The constructor is strict; `read_config` is lenient and reports
unknown keys.
"""

from lorakit.config.lora import LoraConfig, PeftConfig, PeftConfigMixin, read_config
from lorakit.config.types import API_LEVEL, HEADS_BY_TASK, SIDECAR_FILE, PeftType, TaskType, scale
from lorakit.hub_cache import CONFIG_FILE, adapter_directory

__all__ = [
    "API_LEVEL",
    "CONFIG_FILE",
    "HEADS_BY_TASK",
    "SIDECAR_FILE",
    "LoraConfig",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "TaskType",
    "adapter_directory",
    "read_config",
    "scale",
]
