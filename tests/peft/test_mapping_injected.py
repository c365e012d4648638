"""Adapters in a model without a wrapper, as libraries with their own wrapper use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import ConfigError
from lorakit.peft import LoraConfig, get_peft_model
from lorakit.peft.functional import (
    cast_adapter_dtype,
    delete_adapter,
    inject_adapter_in_model,
    set_adapter,
    set_requires_grad,
)
from lorakit.peft.tuners.tuners_utils import BaseTunerLayer
from lorakit.peft.utils import ModulesToSaveWrapper

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def model(**fields: Any) -> nn.Sequential:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for name in ("a", "b"):
        config = LoraConfig(target_modules=["0"], init_lora_weights=False, **fields)
        assert inject_adapter_in_model(config, plain, name) is plain
    return plain


def test_one_at_a_time_and_both() -> None:
    plain = model()
    assert list(plain.peft_config) == ["a", "b"]
    a = plain(X)
    set_adapter(plain, "b")
    b = plain(X)
    assert plain[0].active_adapters == ["b"] and not torch.equal(a, b)
    assert {n.split(".")[2] for n, p in plain.named_parameters() if p.requires_grad} == {"b"}
    set_adapter(plain, ["a", "b"], inference_mode=True)
    assert not any(p.requires_grad for p in plain.parameters())
    set_requires_grad(plain, ["a", "nobody"])
    assert {n.split(".")[2] for n, p in plain.named_parameters() if p.requires_grad} == {"a"}


def test_layer_by_layer_as_transformers_does_it() -> None:
    plain = model(modules_to_save=["2"])
    a = plain(X)
    layers = [m for m in plain.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    assert len(layers) == 2
    for layer in layers:
        layer.enable_adapters(False)
    assert all(layer.disable_adapters and layer.active_adapters == ["a"] for layer in layers)
    assert torch.equal(plain(X), plain[2].original_module(plain[1](plain[0].base_layer(X))))
    for layer in layers:
        layer.enable_adapters(True)
    assert torch.equal(plain(X), a)
    for layer in layers:
        layer.set_adapter("b")
    assert not torch.equal(plain(X), a)
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted. Setting active adapter to a"):
        for layer in layers:
            layer.delete_adapter("b")
    assert torch.equal(plain(X), a)


def test_taking_one_off() -> None:
    plain = model()
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        assert delete_adapter(plain, "a") == ["b"]
    assert delete_adapter(plain, "nobody") == ["b"]
    assert delete_adapter(plain, "b") is None and type(plain[0]) is nn.Linear


def test_where_tensors_say_instead_of_the_config() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    keys = {"1.lora_A.weight": torch.ones(1), "1.lora_B.weight": torch.ones(1)}
    with pytest.warns(RuntimeWarning, match="The PEFT config contained these additional target modules: .'0'") as said:
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), plain, state_dict=keys)
    assert "state_dict contained these additional target modules: ['1']" in str(said[0].message)
    assert type(plain[0]) is nn.Linear and isinstance(plain[1], BaseTunerLayer)
    with pytest.raises(ConfigError, match="uses `target_parameters`"):
        inject_adapter_in_model(LoraConfig(target_parameters=["0.weight"]), plain, "b", state_dict=keys)


def test_dtypes_of_factors() -> None:
    plain = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    wrapped = get_peft_model(plain, LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
    factor = plain[0].lora_A["default"]
    assert factor.weight.dtype == torch.bfloat16
    cast_adapter_dtype(wrapped, "default")
    assert factor.weight.dtype == torch.float32
    wrapped.add_adapter("b", LoraConfig(target_modules=["0"]))
    assert plain[0].lora_A["b"].weight.dtype == torch.float32
