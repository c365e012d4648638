"""`get_peft_model`: the class it returns, its effect on the model, its errors and warnings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import AdapterError, ConfigError, TargetError
from lorakit.peft import LoraConfig, PeftModel, TaskType, get_peft_model
from lorakit.peft.model_classes import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

from .models import bert, t5, trained


@pytest.mark.parametrize("task", [task.value for task in TaskType])
def test_the_class_is_that_of_the_task(task: str) -> None:
    found = PeftModel.for_task(task)
    assert found is PeftModel.for_task(TaskType(task)) is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert found is not PeftModel


def test_each_task_on_a_model_of_its_kind(tiny_gpt2: Any) -> None:
    for task, model, targets, name in (
        ("CAUSAL_LM", tiny_gpt2, ["c_attn"], "PeftModelForCausalLM"),
        ("SEQ_2_SEQ_LM", t5(), ["q"], "PeftModelForSeq2SeqLM"),
        ("SEQ_CLS", bert(), ["query"], "PeftModelForSequenceClassification"),
        ("TOKEN_CLS", bert("TokenClassification"), ["query"], "PeftModelForTokenClassification"),
        ("QUESTION_ANS", bert("QuestionAnswering"), ["query"], "PeftModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", bert(""), ["query"], "PeftModelForFeatureExtraction"),
        (None, bert(""), ["query"], "PeftModel"),
    ):
        wrapped = get_peft_model(model, LoraConfig(task_type=task, target_modules=targets))
        assert type(wrapped).__name__ == name
        assert isinstance(wrapped, PeftModel)


def test_the_model_is_adapted_in_place_and_the_rest_is_frozen(tiny_llama: Any) -> None:
    wrapped = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    assert wrapped.get_base_model() is tiny_llama
    assert wrapped.base_model.model is tiny_llama
    assert all(".lora_" in name for name in trained(wrapped))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in trained(wrapped)


@pytest.mark.parametrize("mode", [True, False])
def test_new_parts_take_the_mode_of_their_model(tiny_llama: Any, mode: bool) -> None:
    wrapped = get_peft_model(tiny_llama.train(mode), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    assert wrapped.training is wrapped.base_model.training is mode
    assert {module.training for module in wrapped.modules() if isinstance(module, nn.Dropout)} == {mode}


def test_the_config_is_only_read(tiny_gpt2: Any) -> None:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=False)
    before = copy.deepcopy(config)
    wrapped = get_peft_model(tiny_gpt2, config)
    assert config == before
    assert wrapped.peft_config["default"] is not config


def test_the_base_name_is_what_the_model_says(tiny_llama: Any) -> None:
    tiny_llama.name_or_path = "someone/something"
    wrapped = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    assert wrapped.peft_config["default"].base_model_name_or_path == "someone/something"


def test_a_wrapped_model_gets_no_second_wrapper(tiny_llama: Any) -> None:
    first = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        second = get_peft_model(first, LoraConfig(target_modules=["v_proj"]), adapter_name="b")
    assert second is first
    assert second.active_adapter == "b"
    assert not any("base_model.model.base_model" in name for name in second.state_dict())
    with pytest.raises(AdapterError, match="Adapter with name 'b' already exists"):
        second.add_adapter("b", LoraConfig(target_modules=["v_proj"]))


def test_a_partial_list_is_warned_about_by_name_where_the_core_raises(tiny_llama: Any) -> None:
    from lorakit.core import attach

    config = LoraConfig(target_modules=["q_proj", "v_porj"])
    text = "target_modules entry 'v_porj' matches no module; nearest: v_proj"
    with pytest.raises(TargetError, match=text):
        attach(tiny_llama, config)
    with pytest.warns(RuntimeWarning, match=text) as said:
        wrapped = get_peft_model(tiny_llama, config)
    assert [w.filename for w in said] == [__file__]  # the line of the caller, not one of ours
    assert {name.rpartition(".")[2] for name in wrapped.targeted_module_names} == {"q_proj"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save entry 'lm_haed' matches no module; nearest: lm_head"),
        ({"exclude_modules": ["k_prj"]}, "exclude_modules entry 'k_prj' matches no module; nearest: k_proj"),
        (
            {"rank_pattern": {"k_proj": 4}},
            r"rank_pattern key 'k_proj' matches none of the adapted modules \(2 in total\)",
        ),
        (
            {"alpha_pattern": {"k_proj": 4}},
            r"alpha_pattern key 'k_proj' matches none of the adapted modules \(2 in total\)",
        ),
    ],
)
def test_other_lists_that_match_nothing_are_warned_about(tiny_llama: Any, fields: dict[str, Any], text: str) -> None:
    with pytest.warns(RuntimeWarning, match=text):
        get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], **fields))


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        (LoraConfig(target_modules=["q_prj"]), TargetError, r"Target modules \['q_prj'\] not found in the base model; nearest: q_proj"),
        (LoraConfig(target_modules=["self_attn"]), TargetError, r"model.layers.0.self_attn \(and 1 more\), named by 'self_attn', is a LlamaAttention, which LoRA does not support"),
        (LoraConfig(target_modules=r"(\1"), ConfigError, r"target_modules: '\(\\\\1' is not a valid regular expression"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="gausian"), ConfigError, "Did you mean gaussian"),
        ({"r": 8}, ConfigError, "peft_config is a dict; it must be a lorakit LoraConfig"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_the_model(tiny_llama: Any, config: Any, kind: type, text: str) -> None:
    before = [(name, type(module)) for name, module in tiny_llama.named_modules()]
    with pytest.raises(kind, match=text):
        get_peft_model(tiny_llama, config)
    assert isinstance(kind("x"), ValueError)  # the class that callers of PEFT catch
    assert [(name, type(module)) for name, module in tiny_llama.named_modules()] == before
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_no_targets_and_no_default_for_the_architecture() -> None:
    with pytest.raises(ConfigError, match=r"Please specify `target_modules` .* there is no default for a Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_no_default_targets_are_needed_on_a_known_architecture(tiny_gpt2: Any) -> None:
    wrapped = get_peft_model(tiny_gpt2, LoraConfig())
    assert {name.rpartition(".")[2] for name in wrapped.targeted_module_names} == {"c_attn"}
    assert wrapped.peft_config["default"].target_modules == {"c_attn"}


def test_a_fresh_adapter_changes_no_output(tiny_gpt2: Any) -> None:
    tokens = torch.arange(8).view(2, 4)
    before = tiny_gpt2(tokens).logits
    assert torch.equal(get_peft_model(tiny_gpt2, LoraConfig())(tokens).logits, before)
