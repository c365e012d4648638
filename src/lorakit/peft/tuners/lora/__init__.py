"""What PEFT gathers under `peft.tuners.lora`."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "config": """
            ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig
            LoraRuntimeConfig MontecloraConfig VeloraConfig
        """,
        "peft.layer_classes": """
            Conv1d Conv2d Conv3d Embedding GPTQLoraLinear Linear Linear4bit Linear8bitLt LoraLayer
            MultiheadAttention ParamWrapper
        """,
        "peft.tuners.lora.model": "LoraModel",
        "peft.data_inits": "get_eva_state_dict initialize_lora_eva_weights preprocess_corda preprocess_loraga",
        "peft.weighted": "convert_to_lora reduce_intruder_dimension save_as_lora",
        "elsewhere": "create_arrow_model",
    },
)
__all__ = __dir__()
