"""`get_peft_model`, and which wrapper class belongs to which task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lorakit.config import LoraConfig, TaskType
from lorakit.errors import ConfigError
from lorakit.peft.model import PeftModel
from lorakit.peft.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = {
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}
"""Task -> wrapper class, under PEFT's own name."""


def class_for(task: TaskType | str | None) -> type[PeftModel]:
    """The wrapper class for a task; `PeftModel` where there is none."""
    return PeftModel if task is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(task).value]


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Adapt a model in place and wrap it as PEFT does.

    Args:
        model: The base; a model that is wrapped already gets a second adapter without a second wrapper.
        peft_config: How the adapter looks; it is only read.
        adapter_name: Its name.
        kwargs: As `PeftModel`.

    Returns:
        The wrapper for the config's task.

    Raises:
        ConfigError: The config is not a LoraConfig, or does not fit.
        TargetError: Nothing matches.
        AdapterError: The name is taken or cannot be used.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}; a lorakit LoraConfig is needed.")
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, peft_config)
        model.set_adapter(adapter_name)
        return model
    return class_for(peft_config.task_type)(model, peft_config, adapter_name, **kwargs)
