"""What PEFT gathers under `peft.utils`."""

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
        "peft.wrappers": "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper",
        "peft.preparing": """
            cast_mixed_precision_params infer_device prepare_model_for_kbit_training shift_tokens_right
        """,
        "peft.structure": """
            _freeze_adapter _get_batch_size _get_input_embeddings_name _get_module_names_tied_with_embedding
            _get_no_split_modules _get_submodules _is_valid_match _set_adapter _set_trainable
            fsdp_auto_wrap_policy get_gptqmodel_quant_linear get_pattern_key get_quantization_config
            id_tensor_storage map_cache_to_layer_device_map match_target_against_key
            set_additional_trainable_modules str_to_bool transpose
        """,
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
