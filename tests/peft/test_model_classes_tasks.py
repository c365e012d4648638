"""The forward of each task: programs read its signature, arguments are positional or named."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from lorakit import peft
from lorakit.peft import LoraConfig, get_peft_model

from .models import bert, ids, randomise, t5

TAIL = ["output_attentions", "output_hidden_states", "return_dict", "task_ids"]
COLUMNS = {
    "CausalLM": ["input_ids", "attention_mask", "inputs_embeds", "labels"],
    "SequenceClassification": ["input_ids", "attention_mask", "inputs_embeds", "labels"],
    "TokenClassification": ["input_ids", "attention_mask", "inputs_embeds", "labels"],
    "FeatureExtraction": ["input_ids", "attention_mask", "inputs_embeds"],
    "Seq2SeqLM": ["input_ids", "attention_mask", "inputs_embeds", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels"],
    "QuestionAnswering": ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "start_positions", "end_positions"],
}  # fmt: skip


@pytest.mark.parametrize("task", COLUMNS)
def test_signature(task: str) -> None:
    signature = inspect.signature(getattr(peft, f"PeftModelFor{task}").forward)
    assert list(signature.parameters) == ["self", *COLUMNS[task], *TAIL, "kwargs"]
    assert all(p.default is None for name, p in signature.parameters.items() if name not in {"self", "kwargs"})


def _bert(head: str, task: str) -> Any:
    model = get_peft_model(bert(head), LoraConfig(target_modules=["query", "value"], task_type=task))
    randomise(model)
    return model


def test_by_place_is_by_name() -> None:
    tokens, mask = ids(), torch.ones(3, 7, dtype=torch.long)
    mask[:, 5:] = 0
    classes = torch.tensor([0, 1, 0])
    model = _bert("SequenceClassification", "SEQ_CLS")
    placed = model(tokens, mask, None, classes)
    named = model(input_ids=tokens, attention_mask=mask, labels=classes)
    assert torch.equal(placed.loss, named.loss)
    assert not torch.equal(named.logits, model(tokens).logits)  # the mask arrives
    answers = _bert("QuestionAnswering", "QUESTION_ANS")
    one, two = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    placed = answers(tokens, mask, None, None, None, one, two)
    assert torch.equal(placed.loss, answers(tokens, attention_mask=mask, start_positions=one, end_positions=two).loss)


def test_embeddings_instead_of_ids() -> None:
    model = _bert("SequenceClassification", "SEQ_CLS")
    vectors = model.get_input_embeddings()(ids())
    assert torch.equal(model(inputs_embeds=vectors).logits, model(ids()).logits)


def test_tuples_and_hidden_states_on_demand() -> None:
    model = _bert("SequenceClassification", "SEQ_CLS")
    assert isinstance(model(ids(), return_dict=False), tuple)
    assert len(model(ids(), output_hidden_states=True).hidden_states) == 3
    assert torch.equal(model(ids(), task_ids=torch.zeros(3)).logits, model(ids()).logits)


def test_what_only_the_model_knows_is_passed_on(tiny_gpt2: Any) -> None:
    model = get_peft_model(tiny_gpt2, LoraConfig(task_type="CAUSAL_LM"))
    assert model(ids(), use_cache=True).past_key_values is not None
    assert model(ids(), logits_to_keep=1).logits.shape[1] == 1


def test_sequences() -> None:
    model = get_peft_model(t5(), LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    randomise(model)
    labels = ids(3, 4)
    placed = model(ids(), None, None, None, None, None, labels)
    assert torch.equal(placed.loss, model(input_ids=ids(), labels=labels).loss)


def test_more_by_place_than_there_is_place_for_is_refused() -> None:
    model = _bert("SequenceClassification", "SEQ_CLS")
    with pytest.raises(TypeError):
        model(*[None] * 12)
    with pytest.raises(TypeError):
        model(ids(), input_ids=ids())


def test_the_class_for_a_task_does_not_depend_on_what_was_imported_before() -> None:
    """In a fresh interpreter, from the first two names that most programs import."""
    program = (
        "from torch import nn\n"
        "from lorakit import LoraConfig, get_peft_model\n"
        "model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(task_type='CAUSAL_LM', target_modules=['0']))\n"
        "print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PeftModelForCausalLM"
