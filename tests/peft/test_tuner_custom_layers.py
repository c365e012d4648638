"""`LoraConfig._register_custom_module`: user-defined layer classes, in this process and again when loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.errors import NotYetSupported
from lorakit.peft import LoraConfig, PeftModel, get_peft_model
from lorakit.peft.tuners import lora


class Own(nn.Module):
    """Acts as an nn.Linear without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 5
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class MyLora(lora.Linear):
    """The layer for it."""


def model() -> nn.Module:
    """The same model every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Own(), nn.Linear(5, 2))


def config() -> LoraConfig:
    """A config that knows the module."""
    made = LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    made._register_custom_module({Own: MyLora})
    return made


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_it_is_used_saved_and_loaded(tmp_path: Path) -> None:
    wrapped, x = get_peft_model(model(), config()), torch.randn(6, 3)
    site = wrapped.base_model.model[1]
    assert type(site) is MyLora
    assert isinstance(site.base_layer, Own)
    wrapped.save_pretrained(str(tmp_path))
    read = LoraConfig.from_pretrained(str(tmp_path))
    read._register_custom_module({Own: MyLora})
    again = PeftModel.from_pretrained(model(), str(tmp_path), config=read)
    assert type(again.base_model.model[1]) is MyLora
    assert torch.equal(again(x), wrapped.eval()(x))


def test_a_type_without_a_kind_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"Unsupported layer type '.*Own'>' encountered, proceed at your own risk\."):
        get_peft_model(model(), config())


def test_it_may_stand_in_for_a_known_layer() -> None:
    made = LoraConfig(target_modules="all-linear")
    made._register_custom_module({nn.Linear: MyLora})
    wrapped = get_peft_model(model(), made)
    assert [type(module).__name__ for module in wrapped.base_model.model] == ["MyLora", "Own", "MyLora"]


def test_a_class_built_on_none_of_the_layers_is_refused() -> None:
    made = LoraConfig(target_modules=["1"])
    made._register_custom_module({Own: nn.Linear})
    with pytest.raises(NotYetSupported, match="a custom layer must be a subclass of a lorakit layer"):
        get_peft_model(model(), made)
