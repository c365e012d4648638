"""Adapters with trainable token embeddings: their attributes and activation, and which cannot be active together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.peft import LoraConfig, get_peft_model
from lorakit.peft.tuners.tuners_utils import BaseTunerLayer


def rows(*indices: int) -> LoraConfig:
    return LoraConfig(target_modules=["1"], trainable_token_indices={"0": list(indices)})


@pytest.fixture
def model() -> Any:
    found = get_peft_model(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), rows(0, 3), adapter_name="a")
    found.add_adapter("b", rows(3))
    found.add_adapter("c", rows(5))
    found.add_adapter("none", LoraConfig(target_modules=["1"]))
    return found


def test_the_same_row_of_two_adapters_is_refused_and_nothing_changes(model: Any) -> None:
    with pytest.raises(ValueError, match=r"Only one adapter can be set at a time for TrainableTokensWrapper.*row 3"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]


def test_rows_apart_act_together(model: Any) -> None:
    model.set_adapter(["a", "c"])
    assert model.base_model.model[0].active_adapters == ["a", "c"]


def test_a_table_lists_the_adapters_that_have_rows_there(model: Any) -> None:
    table = model.base_model.model[0]
    assert table._adapters == {"a", "b", "c"}
    model.set_adapter("none")
    assert table.active_adapters == table.token_adapter.active_adapters == []


def test_a_loop_over_the_tuner_layers_switches_and_disables_the_rows_too(model: Any) -> None:
    model.base_model.model[0].token_adapter.trainable_tokens_delta["c"].data.fill_(7)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert [type(layer).__name__ for layer in layers] == ["TokenAdapter", "Linear"]
    for layer in layers:
        layer.set_adapter("c")
    table, tokens = model.base_model.model[0], torch.tensor([0, 3, 5])
    assert [bool((row == 7).all()) for row in table(tokens)] == [False, False, True]
    delta = table.token_adapter.trainable_tokens_delta
    assert delta["c"].requires_grad and not delta["a"].requires_grad
    assert [layer.active_adapter for layer in layers] == [["c"], "c"]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    assert torch.equal(table(tokens), table.original_module(tokens))
    assert all(layer.disable_adapters for layer in layers)
    layers[0].enable_adapters(enabled=True)
    layers[0].set_requires_grad("c", False)
    assert not delta["c"].requires_grad and layers[0].get_base_layer() is table.original_module
    with pytest.warns(UserWarning, match="c was active which is now deleted"):
        layers[0].delete_adapter("c")
    assert "c" not in delta


def test_what_the_base_has_in_place_of_the_rows(model: Any) -> None:
    table = model.base_model.model[0]
    before = table.original_module.weight.detach().clone()
    table.token_adapter.trainable_tokens_delta["a"].data.normal_()
    model.eval().merge_adapter(["a"])
    found = table.token_adapter.trainable_tokens_original
    assert list(found) == ["a", "b", "c"]
    assert torch.equal(found["a"], before[[0, 3]])
    model.unmerge_adapter()
    model.delete_adapter("b")
    assert "b" not in table.token_adapter.trainable_tokens_original


def test_the_base_rows_are_those_of_the_adapters_that_are_still_there(model: Any) -> None:
    table = model.base_model.model[0].token_adapter
    found = table.trainable_tokens_original
    assert len(found) == 3 and "a" in found and "none" not in found
    model.delete_adapter("b")
    assert list(found) == ["a", "c"] and "b" not in found
    with pytest.raises(KeyError):
        found["b"]


def test_the_rows_have_the_methods_and_sizes_of_peft(model: Any) -> None:
    table = model.base_model.model[0].token_adapter
    assert table._all_available_adapter_names() == ["a", "b", "c"]
    assert (table.in_features, table.out_features) == (8, 4)
    model.delete_adapter("b")
    assert table._all_available_adapter_names() == ["a", "c"]


def test_a_tied_head_has_the_sizes_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False))
    model[2].weight = model[0].weight
    found = get_peft_model(model, LoraConfig(target_modules=["1"], trainable_token_indices={"0": [0], "2": [0]}))
    head = found.base_model.model[2].token_adapter
    assert (head.in_features, head.out_features) == (4, 8)
    assert head._all_available_adapter_names() == ["default"]


def test_deleting_a_merged_adapter_leaves_its_rows(model: Any) -> None:
    table = model.base_model.model[0].token_adapter
    model.eval().merge_adapter(["a"])
    with pytest.raises(ValueError, match=r"a.*merged"):
        model.delete_adapter("a")
    assert table.merged_adapters == ["a"] and table._all_available_adapter_names() == ["a", "b", "c"]
    model.unmerge_adapter()
    model.set_adapter("c")
    model.delete_adapter("a")
    assert not table.merged and table._all_available_adapter_names() == ["b", "c"]
