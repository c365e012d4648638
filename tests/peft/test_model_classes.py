"""`PeftMixedModel`, the automatic classes, a model's card, and preparing a base for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import AdapterError, AdapterFileError, ConfigError, NotYetSupported
from lorakit.peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    cast_mixed_precision_params,
    get_peft_model,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)
from lorakit.peft.utilities import take_gradients_at_the_input


def test_several_active_adapters(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), mixed=True)
    assert type(model) is PeftMixedModel
    model.add_adapter("b", LoraConfig(target_modules=["0"]))
    model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default", "b"]
    with pytest.raises(AdapterError, match=r"Adapter\(s\) \['c'\] not found, available adapters: \['b', 'default'\]"):
        model.set_adapter(["c"])
    for refused in (model.get_layer_status, model.get_model_status):
        with pytest.raises(TypeError, match="not supported for PeftMixedModel"):
            refused()
    with pytest.raises(NotYetSupported, match="Saving is not supported for PeftMixedModel"):
        model.save_pretrained(tmp_path)
    model.delete_adapter(["b"])
    with pytest.raises(ConfigError, match="not compatible with the `PeftMixedModel`"):
        PeftMixedModel(nn.Linear(2, 2), {"r": 8})
    plain = nn.Sequential(nn.Linear(2, 2))
    wrapped = PeftModel(plain, LoraConfig(target_modules=["0"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    assert type(PeftMixedModel.from_pretrained(wrapped.unload(), tmp_path)) is PeftMixedModel


@pytest.fixture
def saved(tiny_llama: Any, tmp_path: Path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_llama.name_or_path = str(tmp_path / "base")
    model = get_peft_model(
        tiny_llama, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_brings_its_base(saved: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(saved)
    assert type(model) is PeftModelForCausalLM and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="Expected target PEFT class: PeftModelForCausalLM, but you have asked for"):
        AutoPeftModelForSequenceClassification.from_pretrained(saved)
    with pytest.raises(ConfigError, match="Cannot use `AutoPeftModel` with a task type"):
        AutoPeftModel.from_pretrained(saved)
    with pytest.raises(OSError, match="designed to be instantiated using"):
        AutoPeftModel()


def test_no_package_is_imported_because_a_file_says_so(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="does not name its base"):
        AutoPeftModel.from_pretrained(tmp_path)
    evil = {"base_model_class": "System", "parent_library": "evil.package"}
    config.with_fields(base_model_name_or_path="x", auto_mapping=evil).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"wants to import 'evil\.package' which is not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path)


def test_a_card_keeps_what_a_person_wrote(saved: Path) -> None:
    card = saved / "README.md"
    text = card.read_text()
    assert "library_name: peft" in text and "pipeline_tag: text-generation" in text and "- PEFT 0.22.0" in text
    card.write_text("---\nlicense: mit\nlibrary_name: mine\n---\n\nHand-written.\n")
    model = AutoPeftModelForCausalLM.from_pretrained(saved)
    model.create_or_update_model_card(saved)
    text = card.read_text()
    assert "license: mit" in text and "library_name: mine" in text and "Hand-written." in text and "base_model" in text
    model.create_or_update_model_card(saved)
    assert card.read_text() == text


def test_a_base_ready_for_training(tiny_llama: Any) -> None:
    tiny_llama.half()
    prepare_model_for_kbit_training(tiny_llama)
    assert {(p.dtype, p.requires_grad) for p in tiny_llama.parameters()} == {(torch.float32, False)}
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    cast_mixed_precision_params(model, torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True), (torch.bfloat16, False)}


def test_labels_as_inputs_of_a_decoder() -> None:
    assert shift_tokens_right(torch.tensor([[5, 6, -100]]), 0, 9).tolist() == [[9, 5, 6]]
    assert shift_tokens_right(torch.tensor([[-100, 6, 7]]), 0, 9).tolist() == [[9, 0, 6]]


def test_gradient_checkpointing_gets_inputs_that_need_gradients(tiny_llama: Any) -> None:
    tiny_llama.activation_checkpointing_enable()
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model.get_input_embeddings()(torch.tensor([[1]])).requires_grad


def test_the_subfolder_is_the_adapters_and_not_the_bases(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.rename(tmp_path / "inside")
    given: list[dict[str, Any]] = []

    def load_base(*_: Any, options: dict[str, Any], **__: Any) -> nn.Module:
        given.append(options)
        raise NotYetSupported("the base is not needed here")

    monkeypatch.setattr("lorakit.hub.models.load_base", load_base)
    with pytest.raises(NotYetSupported):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path, subfolder="inside", torch_dtype="float32")
    assert given == [{"revision": None, "torch_dtype": "float32"}]


def test_a_model_that_cannot_find_its_embedding_enables_gradients_itself() -> None:
    class Model(nn.Module):
        enabled = False

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

        def enable_input_require_grads(self) -> None:
            self.enabled = True

    model = Model()
    take_gradients_at_the_input(model)
    assert model.enabled
