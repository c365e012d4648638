"""PEFT-compatible API over the core: code written for `peft` runs after changing the import.

It contains no arithmetic: every method is a few lines over `lorakit.core`. If something does not fit and PEFT goes on,
this package goes on too, with a warning that names it; the core and the command line raise an error. Each name is
imported from its home on first use. Module paths such as `lorakit.peft.tuners.lora` come from the table in `paths.py`.
"""

from lorakit.config import API_LEVEL as __version__
from lorakit.peft import paths

paths.register()
__getattr__, __dir__ = paths.lazy_names(
    __name__,
    {
        "lorakit.config": f"{paths.LORA_CONFIGS} PeftConfig PeftType TaskType",
        paths.PLACEHOLDERS: f"""
            {paths.OTHER_METHODS} bloom_model_postprocess_past_key_value compose_cartridge_adapters
            initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text NoMatchingPeftModuleError
            PeftError PeftWarning prompt_embeddings_from_past_key_values PromptLearningConfig
        """,
        "lorakit.peft.model_classes": """
            AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
            AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftMixedModel PeftModelForCausalLM PeftModelForFeatureExtraction
            PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification
            PeftModelForTokenClassification
        """,
        "lorakit.peft.structure": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "lorakit.peft.weighted": "convert_to_lora save_as_lora",
        "lorakit.peft.data_inits": """
            get_eva_state_dict initialize_lora_eva_weights preprocess_loraga replace_lora_weights_loftq
        """,
        "lorakit.peft.adjusting": "find_kappa_target_modules",
        "lorakit.peft.layer_classes": "LoraLayer",
        "lorakit.peft.loaded": "load_peft_weights",
        "lorakit.peft.mapping": """
            get_peft_config get_peft_model inject_adapter_in_model PEFT_TYPE_TO_CONFIG_MAPPING
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING
        """,
        "lorakit.peft.model": "PeftModel",
        "lorakit.peft.preparing": "cast_mixed_precision_params prepare_model_for_kbit_training shift_tokens_right",
        "lorakit.peft.installing": "install_as_peft stand_in",
        "lorakit.peft.state_dicts": """
            get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict set_peft_model_state_dict
        """,
        "lorakit.peft.status": "get_layer_status get_model_status",
        "lorakit.peft.trainer_mixin": "LoraTrainerMixin",
        "lorakit.peft.tuner": "LoraModel",
    },
)
__all__ = ["__version__", *__dir__()]
