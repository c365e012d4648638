"""Modules whose weight torch.nn.utils.parametrize computes: they can be adapted, and are never written to."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

from lorakit.config import LoraConfig
from lorakit.core import attach, load_adapter, merge, save_adapter, sites
from lorakit.errors import ConfigError, MergeError

from ...laws.snapshots import same_bits, snapshot
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import randomise, run

MODULES = {
    "linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "conv1d of transformers": (lambda: Conv1D(8, 6), (4, 6)),
    "convolution": (lambda: nn.Conv1d(6, 8, 3), (4, 6, 5)),
    "embedding": (lambda: nn.Embedding(20, 8), ()),
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model whose first module computes its weight, and its input."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    one = make()
    nn.init.normal_(one.weight, std=0.5)
    model = nn.Sequential(OrderedDict(one=parametrizations.weight_norm(one), act=nn.Tanh())).to(dtype)
    return model.eval(), torch.randn(shape, dtype=dtype) if shape else torch.tensor([[3, 0], [7, 19]])


@pytest.mark.filterwarnings("ignore:.*loaded on another base as allowed:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("name", MODULES)
def test_it_is_adapted_as_the_same_weight_is(name: str, dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = model_of(name, dtype)
    plain = run(model, x)
    attach(model, LoraConfig(r=2, target_modules=["one"], use_dora=dora))
    assert same_bits(run(model, x), plain) or dora
    randomise(model, "default", 1)
    adapted = run(model, x)
    assert_differs(adapted, plain, dtype)
    assert {parameter.dtype for parameter in sites(model)[0].layer.parameters_of("default")} == {dtype}
    save_adapter(model, tmp_path)
    stored, _ = model_of(name, dtype)
    parametrize.remove_parametrizations(stored.one, "weight")
    load_adapter(stored, tmp_path, allow=["base_mismatch"])
    assert_close(run(stored, x), adapted, dtype)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_written_to_it(name: str) -> None:
    model, _ = model_of(name)
    with pytest.raises(ConfigError, match=r"computed .*parametrize.* so it cannot be written"):
        attach(model, LoraConfig(r=2, target_modules=["one"], init_lora_weights="pissa"))
    attach(model, LoraConfig(r=2, target_modules=["one"]))
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"'weight' of Parametrized\w+ is computed by torch\.nn\.utils\.parametrize"):
        merge(model)
    assert snapshot(model) == before


def test_the_gradient_stops_before_what_computes_it() -> None:
    model, x = model_of("linear")
    attach(model, LoraConfig(r=2, target_modules=["one"]))
    randomise(model, "default", 1)
    model(x).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "one.lora_A.default.weight",
        "one.lora_B.default.weight",
    }
