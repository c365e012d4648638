"""What PEFT gathers under `peft.utils`."""

from lorakit.peft.elsewhere import TARGET_TABLES
from lorakit.peft.homes_of_utils import OTHER
from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        **OTHER,
        "peft.structure": f"{OTHER['peft.structure']} map_cache_to_layer_device_map",
        "elsewhere": f"_prepare_prompt_learning_config bloom_model_postprocess_past_key_value {TARGET_TABLES}",
        "config": "PeftType TaskType",
        "peft.state_dicts": """
            get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict
            set_peft_model_state_dict
        """,
        "peft.loaded": "load_peft_weights",
        "peft.warnings_and_errors": "NoMatchingPeftModuleError PeftError PeftWarning",
        "peft.registering": "register_peft_method",
        "peft.quantised": "get_quantization_kwargs quantization_extra_repr resolve_quantization_backend",
        "peft.data_inits": "replace_lora_weights_loftq",
    },
)
__all__ = __dir__()
