"""`PeftModel` for each task: the forward states its signature, since programs read from it which columns to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any

from lorakit.config import TaskType
from lorakit.peft.model import PeftModel

_WANTED_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")


def _forward_of(*columns: str) -> Callable[..., Any]:
    """A forward that takes these columns, by place or by name, and PEFT's options after them.

    What is None is not passed on: models differ in which names they take.
    """
    names = (*columns, *_WANTED_OUTPUTS)

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; see `PeftModel.forward` for `adapter_names`."""
        named = dict(zip(names, args, strict=False))
        if len(args) > len(named) or named.keys() & kwargs.keys():
            signature.bind(self, *args, **kwargs)  # raises as Python does: too many, or given twice
        named.update(kwargs)
        named.pop("task_ids", None)  # PEFT passes it to other methods' models only
        return PeftModel.forward(self, **{name: value for name, value in named.items() if value is not None})

    options = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    first, rest = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), Parameter("kwargs", Parameter.VAR_KEYWORD)
    signature = Signature([first, *options, rest])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class PeftModelForCausalLM(PeftModel):
    """For decoder-only language models."""

    task = TaskType.CAUSAL_LM
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForSeq2SeqLM(PeftModel):
    """For encoder-decoder language models."""

    task = TaskType.SEQ_2_SEQ_LM
    forward = _forward_of(
        *("input_ids", "attention_mask", "inputs_embeds"),
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels"),
    )


class PeftModelForSequenceClassification(PeftModel):
    """For classifiers of whole texts; the head is copied and trained whole."""

    task = TaskType.SEQ_CLS
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForTokenClassification(PeftModel):
    """For classifiers of tokens; the head is copied and trained whole."""

    task = TaskType.TOKEN_CLS
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForQuestionAnswering(PeftModel):
    """For extractive question answering; the head is copied and trained whole."""

    task = TaskType.QUESTION_ANS
    forward = _forward_of(
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("start_positions", "end_positions"),
    )


class PeftModelForFeatureExtraction(PeftModel):
    """For models whose hidden states are used."""

    task = TaskType.FEATURE_EXTRACTION
    forward = _forward_of("input_ids", "attention_mask", "inputs_embeds")


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = {
    kind.task.value: kind for kind in PeftModel.__subclasses__() if kind.task is not None
}
"""Task -> wrapper class, under PEFT's own name."""
