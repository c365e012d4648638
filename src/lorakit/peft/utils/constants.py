"""Constants under PEFT's module path."""

from lorakit.peft.elsewhere import TARGET_TABLES
from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.constants_of_files": """
            ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES
            INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME
            SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
            UPCAST_DTYPES WEIGHTS_NAME
        """,
        "peft.tuners.lora.model": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "elsewhere": f"bloom_model_postprocess_past_key_value {TARGET_TABLES}",
    },
)
__all__ = __dir__()
