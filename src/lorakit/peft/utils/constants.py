"""Constants under PEFT's module path."""

from lorakit.peft.elsewhere import TARGET_TABLES
from lorakit.peft.homes_of_utils import CONSTANTS
from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__, {**CONSTANTS, "elsewhere": f"bloom_model_postprocess_past_key_value {TARGET_TABLES}"}
)
__all__ = __dir__()
