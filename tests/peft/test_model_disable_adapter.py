"""`disable_adapter`: PEFT's `requires_grad` flags inside and afterwards, without effects on other threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.peft import LoraConfig, get_peft_model

from .models import trained


@pytest.fixture
def model() -> Any:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(8, 4))
    found = get_peft_model(base, LoraConfig(target_modules=["0", "2"], modules_to_save=["1"]))
    found.add_adapter("other", LoraConfig(target_modules=["0"]))
    return found


def test_nothing_is_trained_in_the_block_and_the_same_after_it(model: Any) -> None:
    model.base_model.model[0].lora_A["default"].weight.requires_grad_(False)  # what was frozen stays so
    before = trained(model)
    with model.disable_adapter():
        assert trained(model) == set()
        with model.disable_adapter():
            assert trained(model) == set()
        assert trained(model) == set()
    assert trained(model) == before != set()


def test_flags_come_back_when_the_block_raises(model: Any) -> None:
    before = trained(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert trained(model) == before


def test_an_adapter_that_is_chosen_in_the_block_is_the_one_that_is_trained(model: Any) -> None:
    with model.disable_adapter():
        model.set_adapter("other")
    assert {name.split(".")[-2] for name in trained(model)} == {"other"}


def test_where_no_gradient_is_recorded_flags_are_left_alone(model: Any) -> None:
    before = trained(model)
    with torch.no_grad(), model.disable_adapter():
        assert trained(model) == before
