"""PEFT-compatible API built on the core: to run code written for `peft`, change only its imports.

Its methods delegate to `lorakit.core`, and warn of mismatches that PEFT silently ignores and the core rejects. Names
are imported from their defining modules on first use; `paths.py` lists module paths such as `lorakit.peft.tuners.lora`.
"""

from lorakit.config import API_LEVEL as __version__
from lorakit.peft import paths

paths.register()
__getattr__, __dir__ = paths.lazy_names(
    __name__,
    f"""
        {paths.OTHER_METHODS} {paths.LORA_CONFIGS}
        {paths.HOMES["lorakit.peft.installing"]} {paths.HOMES["lorakit.peft.mapping"]}
        {paths.HOMES["lorakit.peft.model"]} {paths.AUTO_CLASSES} MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftMixedModel
        {paths.HOMES["lorakit.peft.state_dicts"]} bloom_model_postprocess_past_key_value cast_mixed_precision_params
        compose_cartridge_adapters convert_to_lora create_arrow_model find_kappa_target_modules get_eva_state_dict
        get_layer_status get_model_status initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
        initialize_lora_eva_weights load_peft_weights LoraLayer LoraModel LoraTrainerMixin NoMatchingPeftModuleError
        PeftConfig PeftError PeftType PeftWarning prepare_model_for_kbit_training preprocess_loraga
        prompt_embeddings_from_past_key_values PromptLearningConfig replace_lora_weights_loftq save_as_lora
        shift_tokens_right TaskType TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    """,
)
__all__ = ["__version__", *__dir__()]
