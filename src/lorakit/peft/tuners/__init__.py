"""What PEFT gathers under `peft.tuners`."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "config": """
            ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig
            MontecloraConfig VeloraConfig
        """,
        "elsewhere": """
            AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel
            BeftConfig BeftModel BOFTConfig BOFTModel C3AConfig C3AModel CartridgeConfig CartridgeEncoder
            CPTConfig CPTEmbedding create_arrow_model DeftConfig DeftModel DeloraConfig DeloraModel
            FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig
            GraloraModel HiraConfig HiraModel HRAConfig HRAModel IA3Config IA3Model LilyConfig LilyModel
            LNTuningConfig LNTuningModel LoHaConfig LoHaModel LoKrConfig LoKrModel MissConfig MissModel
            MixedModel MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig
            OFTModel OSFConfig OSFModel PeanutConfig PeanutModel PolyConfig PolyModel PrefixEncoder
            PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig
            PromptEncoderReparameterizationType PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel
            PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel
            ShiraConfig ShiraModel SupertuningConfig SupertuningModel TinyLoraConfig TinyLoraModel
            TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel
            VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel
        """,
        "peft.weighted": "convert_to_lora save_as_lora",
        "peft.data_inits": "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga",
        "peft.tuners.lora.model": "LoraModel",
    },
)
__all__ = __dir__()
