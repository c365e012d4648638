"""`LoraConfig` and its helper types. Field defaults and the scale formula are defined only here.

Names, defaults and `adapter_config.json` follow PEFT. The constructor is strict; `read_config` is lenient and reports
unknown keys.
"""

from lorakit.config.checks import NOT_BUILT, check_built
from lorakit.config.lora import (
    PEFT_TABLES_OF_VARIANTS,
    LoraConfig,
    PeftConfig,
    PeftConfigMixin,
    read_config,
)
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
from lorakit.config.types import API_LEVEL, HEADS_BY_TASK, SIDECAR_FILE, PeftType, TaskType, scale
from lorakit.config.variants import VARIANT_COSTS, VariantCosts, costs_of
from lorakit.hub_cache import CONFIG_FILE, adapter_directory, looks_like_a_hub_id

__all__ = [
    "API_LEVEL",
    "CONFIG_FILE",
    "HEADS_BY_TASK",
    "NOT_BUILT",
    "PEFT_TABLES_OF_VARIANTS",
    "SIDECAR_FILE",
    "VARIANT_COSTS",
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
    "VariantCosts",
    "VeloraConfig",
    "adapter_directory",
    "check_built",
    "costs_of",
    "looks_like_a_hub_id",
    "read_config",
    "scale",
]
