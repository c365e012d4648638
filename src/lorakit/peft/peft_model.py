"""The wrapper, its task classes and the status functions, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.model": "PeftModel",
        "peft.tasks": """
            PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
            PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
        """,
        "peft.status": "get_layer_status get_model_status TunerLayerStatus TunerModelStatus",
    },
)
__all__ = __dir__()
