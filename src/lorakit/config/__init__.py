"""`LoraConfig` and its words: the only home of the field's defaults and of the scale rule.

The field names, defaults and the file `adapter_config.json` are PEFT's, so that configs travel both ways.
The constructor is strict; reading a file from elsewhere is tolerant and says what it does not know. This part
knows nothing about models, matching or tensors.
"""

from lorakit.config.file import config_file, looks_like_a_hub_id
from lorakit.config.lora import PEFT_TABLES_OF_VARIANTS, LoraConfig, PeftConfig, PeftConfigMixin
from lorakit.config.nested import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lorakit.config.reading import NOT_BUILT, check_built, read_config
from lorakit.config.types import API_LEVEL, BIAS_CHOICES, CONFIG_FILE, HEADS_BY_TASK, PeftType, TaskType, scale

__all__ = [
    "API_LEVEL",
    "BIAS_CHOICES",
    "CONFIG_FILE",
    "HEADS_BY_TASK",
    "NOT_BUILT",
    "PEFT_TABLES_OF_VARIANTS",
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "TaskType",
    "VeloraConfig",
    "check_built",
    "config_file",
    "looks_like_a_hub_id",
    "read_config",
    "scale",
]
