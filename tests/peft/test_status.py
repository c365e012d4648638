"""The status of layers and models, compared with the installed peft."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from lorakit.errors import AdapterError
from lorakit.peft import LoraConfig, get_layer_status, get_model_status, get_peft_model
from lorakit.peft.utils.quantization_utils import Bnb8bitBackend


def both(config: dict[str, Any], do: Any) -> tuple[Any, Any]:
    """The same done with lorakit and with peft."""
    peft = pytest.importorskip("peft")
    made = []
    for package in (lorakit_, peft):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        wrapped = package.get_peft_model(model, package.LoraConfig(**config))
        wrapped.add_adapter("b", package.LoraConfig(**config))
        do(wrapped.eval())
        made.append(wrapped)
    return made[0], made[1]


class lorakit_:
    """Return a class name of lorakit as `peft` names it."""

    LoraConfig, get_peft_model = LoraConfig, staticmethod(get_peft_model)


STEPS = {
    "fresh": lambda m: None,
    "another": lambda m: m.set_adapter("b"),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "frozen": lambda m: m.set_requires_grad("default", False),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_model_says_what_it_says_in_peft(step: str) -> None:
    ours, theirs = both({"target_modules": ["0"], "modules_to_save": ["2"]}, STEPS[step])
    wanted, found = dataclasses.asdict(theirs.get_model_status()), dataclasses.asdict(ours.get_model_status())
    if step == "merged":
        found.pop("merged_adapters"), wanted.pop("merged_adapters")  # PEFT does not count modules_to_save as merged
    assert found == wanted


def test_each_layer_says_what_it_says_in_peft() -> None:
    ours, theirs = both({"target_modules": ["0"], "modules_to_save": ["2"]}, lambda m: None)
    found, wanted = get_layer_status(ours), theirs.get_layer_status()
    assert [s.name for s in found] == [s.name for s in wanted]
    for one, other in zip(found, wanted, strict=True):
        fields = ("enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices")
        assert {f: getattr(one, f) for f in fields} == {f: getattr(other, f) for f in fields}
    assert found[0].module_type == "lora.Linear"


def test_layers_that_do_not_agree_are_irregular() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LoraConfig(target_modules=["0", "1"]))
    model.base_model.model[0].enable_adapters(False)
    assert get_model_status(model).enabled == "irregular"
    text = "some adapter layers that are enabled and others that are disabled"
    with pytest.warns(UserWarning, match=text), model.disable_adapter():
        pass
    assert get_model_status(model).enabled is True
    model.base_model.model[0].enable_adapters(False)
    with pytest.warns(UserWarning, match=text), pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert get_model_status(model).enabled is True


def test_a_bare_model_and_one_without_adapters() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])).get_base_model()
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    with pytest.raises(AdapterError, match="No adapter layers found in the model"):
        get_layer_status(nn.Linear(2, 2))


def test_of_a_tied_layer_and_of_a_copy_without_parameters(tiny_llama: Any) -> None:
    tied = get_peft_model(
        tiny_llama, LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, r=2)
    )
    assert {status.name.rpartition(".")[2]: status.requires_grad for status in get_layer_status(tied)} == {
        "embed_tokens": {"default": True},
        "lm_head": {},
    }
    assert get_model_status(tied).requires_grad == {"default": True}
    plain = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    saved = get_peft_model(plain, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    assert [status.requires_grad for status in get_layer_status(saved)] == [{"default": True}, {}]


def test_a_quantization_backend_set_by_a_program_is_shown() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0", "1"]))
    model.base_model.model[0].quantization_backend = Bnb8bitBackend()
    assert [status.quantization_backend for status in model.get_layer_status()] == ["bnb 8bit", None]
    assert model.get_model_status().quantization_backend == "irregular"
