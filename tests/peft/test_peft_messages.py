"""Errors and warnings that programs match: they start with PEFT's message and derive from its built-in class."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.errors import TargetError
from lorakit.peft import (
    LoraConfig,
    LoraModel,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from lorakit.peft.tuners.lora.model import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from lorakit.peft.tuners.tuners_utils import BaseTuner
from lorakit.peft.utils.hotswap import hotswap_adapter
from lorakit.peft.utils.other import _get_module_names_tied_with_embedding

from .models import t5


def plain(bias: bool = True) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias), nn.Embedding(8, 4))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": ["0", "1", "2"], "exclude_modules": ["0", "1", "2"]}, "All modules were excluded"),
        ({"target_modules": ["0", "nope"], "exclude_modules": ["0"]}, "No modules were targeted for adaptation"),
        ({"target_modules": ["1"], "modules_to_save": ["1"]}, "No modules were targeted for adaptation"),
        ({"target_modules": ["nope"]}, r"Target modules \['nope'\] not found in the base model"),
    ],
)
def test_no_target_is_left(fields: dict[str, Any], text: str) -> None:
    base = plain()
    with pytest.raises(TargetError, match=f"^{text}"):
        get_peft_model(base, LoraConfig(**fields))
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"exclude_modules": ["nope"]}, r"You have passed exclude_modules=.* but no modules were excluded\."),
        ({"target_parameters": ["0.nope"]}, r"target_parameters=.* were set but no parameter was matched\..*0\.nope"),
        (
            {"target_modules": ["nope"], "target_parameters": ["0.weight"]},
            r"target_modules=\{'nope'\} were set but no module was matched\.",
        ),
    ],
)
def test_a_list_of_which_nothing_matches(fields: dict[str, Any], text: str) -> None:
    with pytest.warns(UserWarning, match=text) as said:
        get_peft_model(plain(), LoraConfig(**{"target_modules": ["1"], **fields}))
    assert all(issubclass(warning.category, RuntimeWarning) for warning in said)


def test_a_bias_of_b_without_one_in_the_base() -> None:
    with pytest.warns(
        PeftWarning, match="the targeted layer of type Linear has no bias: 'default' is applied to 0, 1, but"
    ):
        model = get_peft_model(plain(bias=False), LoraConfig(target_modules=["0", "1"], lora_bias=True))
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True` because the base layer has"):
        model.eval().merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(plain(), LoraConfig(target_modules=["0"], lora_bias=True))


@pytest.mark.parametrize("part", [nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleDict({"a": nn.Linear(4, 4)})])
def test_a_container_is_not_copied_whole(part: nn.Module) -> None:
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "many": part})
    with pytest.raises(
        TypeError, match=r"modules_to_save cannot be applied to modules of type Module(List|Dict): many"
    ):
        get_peft_model(base, LoraConfig(target_modules=["lin"], modules_to_save=["many"]))
    assert base["many"] is part


def test_names_that_do_not_fit_a_base_are_a_runtime_error_as_in_torch() -> None:
    model = get_peft_model(plain(), LoraConfig(target_modules=["0"]))
    with pytest.raises(RuntimeError, match="Missing key"):
        set_base_model_state_dict(model, {})


def test_a_swapped_adapter_with_a_key_too_many(tmp_path: Path) -> None:
    model = get_peft_model(plain(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    held["base_model.model.1.lora_A.weight"] = torch.zeros(8, 4)
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"succeed, unexpected keys found: base_model\.model\.1\.lora_A\.default"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


class TestDefaultTargets:
    def test_are_looked_up_in_a_table_that_programs_extend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "mine", ["1"])  # type: ignore[misc]
        for config in ({"model_type": "mine"}, WithTable()):
            base = plain()
            base.config = config
            assert get_peft_model(base, LoraConfig()).targeted_module_names == ["1"]

    def test_say_nothing_where_tensors_say_where_an_adapter_sits(self, tiny_gpt2: Any) -> None:
        tensors = get_peft_model_state_dict(inject_adapter_in_model(LoraConfig(), tiny_gpt2))
        LoraModel(tiny_gpt2).unload()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            inject_adapter_in_model(LoraConfig(), tiny_gpt2, state_dict=tensors)
        assert get_peft_model_state_dict(tiny_gpt2).keys() == tensors.keys()


class WithTable:
    def to_dict(self) -> dict[str, str]:
        return {"model_type": "mine"}


@dataclasses.dataclass
class Config:
    width: int = 4


def test_a_config_that_is_a_dataclass() -> None:
    base = plain()
    base.config = Config()
    assert BaseTuner.get_model_config(base) == {"width": 4}


def test_what_is_tied_to_the_embedding() -> None:
    model = t5()
    tied = _get_module_names_tied_with_embedding(model)
    assert tied == sorted(tied) and "lm_head" in tied
    wrapped: PeftModel = get_peft_model(model, LoraConfig(target_modules=["q"]))
    assert wrapped._get_module_names_tied_with_embedding() == tied
    model.config.tie_word_embeddings = False
    assert _get_module_names_tied_with_embedding(model) == []


def test_a_card_that_nobody_wrote_says_how_to_use_the_adapter_and_what_is_missing(tmp_path: Path) -> None:
    model = get_peft_model(plain(), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and "**Training data**" in card and "library_name: peft" in card
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


def test_factors_that_were_not_gathered_are_said(tmp_path: Path) -> None:
    model = get_peft_model(plain(), LoraConfig(target_modules=["0"]))
    model.base_model.model[0].lora_A["default"].weight.data = torch.zeros(32)
    with pytest.warns(PeftWarning, match=r"0\.lora_A\.weight is flat"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
