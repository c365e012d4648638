"""The field's own interface over the core: code written for `peft` runs after changing the import.

It holds no arithmetic: every method is a few lines over `lorakit.core`. Where PEFT goes on although something
does not fit, so does this face, with a warning that names it; the core and the command line refuse. Each name
is imported from its home when it is asked for.
"""

from lorakit.config import API_LEVEL as __version__
from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "config": """
            ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig
            LoraRuntimeConfig MontecloraConfig PeftConfig PeftType TaskType VeloraConfig
        """,
        "elsewhere": """
            AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel
            BeftConfig BeftModel bloom_model_postprocess_past_key_value BOFTConfig BOFTModel C3AConfig C3AModel
            CartridgeConfig CartridgeEncoder compose_cartridge_adapters CPTConfig CPTEmbedding
            create_arrow_model DeftConfig DeftModel DeloraConfig DeloraModel FourierFTConfig FourierFTModel
            FrodConfig FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HiraConfig HiraModel
            HRAConfig HRAModel IA3Config IA3Model initialize_kv_prefix_from_past_key_values
            initialize_kv_prefix_from_text LilyConfig LilyModel LNTuningConfig LNTuningModel LoHaConfig
            LoHaModel LoKrConfig LoKrModel MissConfig MissModel MultitaskPromptTuningConfig
            MultitaskPromptTuningInit OFTConfig OFTModel OSFConfig OSFModel PeanutConfig PeanutModel PolyConfig
            PolyModel PrefixEncoder PrefixTuningConfig prompt_embeddings_from_past_key_values PromptEmbedding
            PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptLearningConfig
            PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel PveraConfig PveraModel RandLoraConfig
            RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig
            SupertuningModel TinyLoraConfig TinyLoraModel TrainableTokensConfig TrainableTokensModel
            UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel VeraConfig VeraModel WaveFTConfig WaveFTModel
            XLoraConfig XLoraModel
        """,
        "peft.auto": """
            AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction
            AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
            AutoPeftModelForTokenClassification
        """,
        "peft.constants_of_files": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "peft.weighted": "convert_to_lora save_as_lora",
        "peft.data_inits": """
            get_eva_state_dict initialize_lora_eva_weights preprocess_loraga replace_lora_weights_loftq
        """,
        "peft.kappa": "find_kappa_target_modules",
        "peft.layer_classes": "LoraLayer",
        "peft.loaded": "load_peft_weights",
        "peft.mapping": """
            get_peft_config inject_adapter_in_model PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING
            PEFT_TYPE_TO_TUNER_MAPPING
        """,
        "peft.mapping_func": "get_peft_model",
        "peft.mixed_model": "PeftMixedModel",
        "peft.model": "PeftModel",
        "peft.preparing": "cast_mixed_precision_params prepare_model_for_kbit_training shift_tokens_right",
        "peft.standing_in": "stand_in",
        "peft.state_dicts": """
            get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict
            set_peft_model_state_dict
        """,
        "peft.status": "get_layer_status get_model_status",
        "peft.tasks": """
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModelForCausalLM PeftModelForFeatureExtraction
            PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification
            PeftModelForTokenClassification
        """,
        "peft.trainer_mixin": "LoraTrainerMixin",
        "peft.tuners.lora.model": "LoraModel",
        "peft.warnings_and_errors": "NoMatchingPeftModuleError PeftError PeftWarning",
    },
)
__all__ = ["__version__", *__dir__()]
