"""Tensors that DeepSpeed partitions, with its API replaced; FSDP is tested in tests/peft/test_state_dicts_sharded.py."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core.factor import FactorWeight
from lorakit.core.shards import completed, is_shard, shape_of, write
from lorakit.errors import AdapterError, MissingExtra, NotYetSupported
from lorakit.peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict


class Status(Enum):
    """The states of a parameter that DeepSpeed names."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


def partition(parameter: Any) -> None:
    """Take a parameter's values away, as ZeRO-3 does outside of `GatheredParameters`."""
    parameter.ds_id, parameter.ds_shape, parameter.elsewhere = id(parameter), parameter.shape, parameter.data
    parameter.ds_status, parameter.data = Status.NOT_AVAILABLE, torch.empty(0)


class GatheredParameters:
    """Gives parameters their values within a block, and keeps changes only if a writer was named."""

    def __init__(self, params: Sequence[Any], modifier_rank: int | None = None) -> None:
        self.params, self.writer = params, modifier_rank

    def __enter__(self) -> None:
        for parameter in self.params:
            parameter.data, parameter.ds_status = parameter.elsewhere.clone(), Status.AVAILABLE

    def __exit__(self, *_: object) -> None:
        for parameter in self.params:
            if self.writer is not None:
                parameter.elsewhere = parameter.data
            parameter.data, parameter.ds_status = torch.empty(0), Status.NOT_AVAILABLE


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module with the parts of DeepSpeed's API that are used."""
    module: Any = ModuleType("deepspeed")
    module.__version__, module.zero = "0.19.8", SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    yield module


def adapted(seed: int = 0, use_dora: bool = True) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["0"], use_dora=use_dora, init_lora_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), config)


def test_a_partitioned_adapter_is_read_saved_and_loaded_whole(deepspeed: ModuleType, tmp_path: Path) -> None:
    model, other = adapted(), get_peft_model_state_dict(adapted(1))
    expected = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path / "whole")
    for parameter in model.parameters():
        partition(parameter)
    found = get_peft_model_state_dict(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    model.save_pretrained(tmp_path / "partitioned")
    file = "adapter_model.safetensors"
    assert (tmp_path / "partitioned" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    set_peft_model_state_dict(model, other)
    found = get_peft_model_state_dict(model)
    assert all(torch.equal(found[name], other[name]) for name in other)
    for given in ({}, {name: tensor.flatten() for name, tensor in expected.items()}):
        with warnings.catch_warnings(), pytest.raises(AdapterError, match="nothing was written") as refused:
            warnings.simplefilter("ignore")  # a state dict without the adapter's tensors is warned about, too
            model.save_pretrained(tmp_path / "incomplete", state_dict=given)
        assert refused.value.field == "state_dict" and "lora_" in str(refused.value.where)
    assert not (tmp_path / "incomplete").exists()


def gather(module: nn.Module) -> None:
    """Give the partitioned parameters of a module and its submodules their values."""
    for parameter in module.parameters():
        parameter.data, parameter.ds_status = parameter.elsewhere, Status.AVAILABLE


def release(module: nn.Module) -> None:
    """Take the values of a module's own parameters away, as ZeRO-3 does after the module's forward pass."""
    for parameter in module.parameters(recurse=False):
        parameter.data, parameter.ds_status = torch.empty(0), Status.NOT_AVAILABLE


@pytest.mark.parametrize("use_dora", [False, True])
def test_factors_are_whole_where_they_are_read(use_dora: bool) -> None:
    x, model = torch.randn(5, 4), adapted(use_dora=use_dora)
    expected = model(x)
    for parameter in model.parameters():
        partition(parameter)
    gather(model)  # DeepSpeed gathers what a forward pass reads, until the module that holds it has been called
    for module in model.modules():
        if isinstance(module, FactorWeight):
            module.register_forward_pre_hook(lambda module, _: gather(module))
            module.register_forward_hook(lambda module, *_: release(module))
    torch.testing.assert_close(model(x), expected)


def test_what_deepspeed_cannot_gather_is_named(deepspeed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    partition(parameter)
    assert is_shard(parameter) and tuple(shape_of(parameter)) == (2, 3)
    parameter.elsewhere = torch.empty(0)
    with pytest.raises(AdapterError, match="every process") as refused:
        completed({"x": parameter})
    assert refused.value.what == "x"
    deepspeed.__version__ = "0.15.4"
    for use in (lambda: completed({"x": parameter}), lambda: write({"x": (parameter, torch.ones(2, 3))})):
        with pytest.raises(NotYetSupported, match=r"pip install 'deepspeed>=0\.16'") as old:
            use()
        assert (old.value.what, old.value.field, old.value.allowed) == ("0.15.4", "deepspeed", ("0.16",))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtra, match="pip install") as missing:
        completed({"x": parameter})
    assert missing.value.what == "deepspeed"


def test_whole_tensors_are_returned_as_they_are() -> None:
    named = {"b": torch.ones(2), "a": nn.Parameter(torch.ones(1))}
    found = completed(named)
    assert list(found) == ["b", "a"] and all(found[name] is named[name] for name in named)
    assert completed({}) == {}
