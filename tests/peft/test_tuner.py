"""`LoraModel`: merging, unmerging and unloading with PEFT's API."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import AdapterError, MergeError, TargetError
from lorakit.peft import LoraConfig, get_peft_model

from .models import bert, ids, randomise, trained

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def two(tiny_llama: Any) -> Any:
    """Two adapters "a" and "b" with different values; "a" is active."""
    model = get_peft_model(tiny_llama, CONFIG, adapter_name="a")
    model.add_adapter("b", CONFIG)
    randomise(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_merge_and_unload_gives_the_plain_model(two: Any, tiny_llama: Any) -> None:
    adapted = logits(two)
    merged = two.merge_and_unload(progressbar=False, safe_merge=True)
    assert merged is tiny_llama
    assert not any("lora_" in name or "base_layer" in name for name in merged.state_dict())
    close(logits(merged), adapted)


def test_merge_and_unload_of_another_than_the_active(two: Any) -> None:
    two.set_adapter("b")
    adapted = logits(two)
    two.set_adapter("a")
    close(logits(two.merge_and_unload(adapter_names=["b"])), adapted)


def test_unload_gives_the_base_back_to_the_bit(two: Any) -> None:
    with two.disable_adapter():
        base = logits(two)
    plain = two.unload()
    assert torch.equal(logits(plain), base)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_merge_adapter_and_back(two: Any) -> None:
    before = {name: tensor.clone() for name, tensor in two.state_dict().items()}
    adapted = logits(two)
    two.merge_adapter()
    site = two.base_model.model.model.layers[0].mlp.down_proj
    assert site.merged_adapters == ["a"]
    close(logits(two), adapted)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        two.merge_adapter()
    two.unmerge_adapter()
    assert site.merged_adapters == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in two.state_dict().items())
    assert torch.equal(logits(two), adapted)


def test_switching_while_merged_is_right(two: Any) -> None:
    two.set_adapter("b")
    expected = logits(two)
    two.set_adapter("a")
    two.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging the model first"):
        two.set_adapter("b")
    assert torch.equal(logits(two), expected)
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        two.unmerge_adapter()


def test_unload_while_merged_gives_the_base_bits(two: Any) -> None:
    with two.disable_adapter():
        base = logits(two)
    two.merge_adapter(["a", "b"])
    assert torch.equal(logits(two.unload()), base)


def test_unknown_adapters(two: Any) -> None:
    with pytest.raises(AdapterError, match=r"Adapter 'c' not found on this model; available: a, b\."):
        two.merge_adapter(["c"])
    with pytest.raises(AdapterError, match=r"Adapter 'c' not found on this model; available: a, b\."):
        two.merge_and_unload(adapter_names=["a", "c"])
    assert trained(two)


def test_not_a_number_is_never_merged(two: Any) -> None:
    with torch.no_grad():
        two.base_model.model.model.layers[1].mlp.down_proj.lora_A["a"].weight.fill_(float("inf"))
    before = {name: tensor.clone() for name, tensor in two.state_dict().items()}
    with pytest.raises(MergeError, match=r"model\.layers\.1\.mlp\.down_proj gives NaN or infinite weights"):
        two.merge_adapter()
    with pytest.raises(MergeError, match="gives NaN or infinite weights"):
        two.merge_and_unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in two.state_dict().items())


def test_heads_and_biases_are_merged_too() -> None:
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS", bias="all")
    model = get_peft_model(bert(), config)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(".bias"):
                parameter.add_(0.1)
    adapted = logits(model)
    close(logits(model.merge_and_unload()), adapted)


def test_two_trained_biases_cannot_be_had() -> None:
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], bias="all"))
    with pytest.raises(ValueError, match="LoraModel supports only 1 adapter with bias"):
        model.add_adapter("b", LoraConfig(target_modules=["query"], bias="lora_only"))


def test_the_repr_shows_where_adapters_sit(two: Any) -> None:
    text = repr(two)
    assert text.startswith("PeftModelForCausalLM(\n  (base_model): LoraModel(\n    (model): LlamaForCausalLM(")
    assert "(q_proj): lora.Linear(" in text
    assert "(base_layer): Linear(in_features=32, out_features=32, bias=False)" in text


def test_targeted_names_are_in_the_order_in_which_adapters_were_added() -> None:
    model = get_peft_model(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), LoraConfig(target_modules=["1"]))
    model.add_adapter("b", LoraConfig(target_modules=["0", "1", "2"]))
    assert model.base_model.targeted_module_names == ["1", "0", "2"]


def test_a_config_in_peft_config_can_be_injected() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    tuner = model.base_model
    with pytest.raises(AdapterError, match="on the model already"):
        tuner.inject_adapter(tuner.model, "default")
    with pytest.raises(AdapterError, match="second"):
        tuner.inject_adapter(tuner.model, "second")
    wrong = LoraConfig(target_modules=["nothing"])
    model.peft_config["second"] = wrong
    with pytest.raises(TargetError):
        tuner.inject_adapter(tuner.model, "second")
    assert model.peft_config["second"] is wrong
    model.peft_config["second"] = LoraConfig(target_modules=["1"], r=3)
    tuner.inject_adapter(tuner.model, "second")
    assert tuner.model[1].r == {"second": 3} and model.active_adapters == ["default"]
    assert not tuner.model[1].lora_A["second"].weight.requires_grad
