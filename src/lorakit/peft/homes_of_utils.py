"""Where the names live that PEFT shows under `peft.utils`, and again under its `other` and `constants`."""

from __future__ import annotations

from collections.abc import Mapping

CONSTANTS: Mapping[str, str] = {
    "peft.constants_of_files": """
        ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES
        INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME
        SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
        UPCAST_DTYPES WEIGHTS_NAME
    """,
    "peft.tuners.lora.model": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
}
"""A home below `lorakit` -> names, as `lazy.names_of` takes them."""

OTHER: Mapping[str, str] = {
    **CONSTANTS,
    "peft.wrappers": "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper",
    "peft.preparing": """
        cast_mixed_precision_params infer_device prepare_model_for_kbit_training shift_tokens_right
    """,
    "peft.structure": """
        _freeze_adapter _get_batch_size _get_input_embeddings_name _get_module_names_tied_with_embedding
        _get_no_split_modules _get_submodules _is_valid_match _set_adapter _set_trainable
        fsdp_auto_wrap_policy get_gptqmodel_quant_linear get_pattern_key get_quantization_config
        id_tensor_storage match_target_against_key set_additional_trainable_modules str_to_bool transpose
    """,
}
