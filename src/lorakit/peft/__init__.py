"""The field's own interface over the core: code written for `peft` runs after changing the import.

It holds no arithmetic: every method is a few lines over `lorakit.core`. Where PEFT goes on although something
does not fit, so does this face, with a warning that names it; the core and the command line refuse.
"""

from lorakit.config import API_LEVEL as __version__
from lorakit.config import LoraConfig, PeftType, TaskType
from lorakit.core import LoraLayer
from lorakit.peft.mapping import get_peft_model
from lorakit.peft.model import PeftModel
from lorakit.peft.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from lorakit.peft.tuner import LoraModel

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "__version__",
    "get_peft_model",
]
