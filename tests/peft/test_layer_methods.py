"""Attributes and methods of adapted layers that libraries built on PEFT use, layer by layer."""

from __future__ import annotations

import contextlib
import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import attach, disable, merge, use
from lorakit.core.model.index import walk
from lorakit.errors import AdapterError, MergeError, RouteError
from lorakit.peft import convert_to_lora, get_peft_model, inject_adapter_in_model
from lorakit.peft.adjusting import KappaTuneSelector, condition_number
from lorakit.peft.layer_methods import PeftLayerMethods
from lorakit.speed.patching import make_replacement

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def adapted(**fields: Any) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    for name in ("a", "b"):
        attach(model, LoraConfig(target_modules=["0", "1"], init_lora_weights=False, r=2, **fields), name)
    return model.eval()


def test_attributes() -> None:
    layer: Any = adapted(use_rslora=True)[0]
    assert (layer.in_features, layer.out_features, layer.fan_in_fan_out, layer.merged) == (4, 6, False, False)
    assert layer.get_base_layer() is layer.base_layer
    assert torch.equal(layer.get_base_weight(), layer.base_layer.weight)


def in_peft(**fields: Any) -> nn.Sequential:
    model = adapted(**fields)
    config = LoraConfig(target_modules=["0", "1"], r=2, use_rslora=True)
    injected: nn.Sequential = inject_adapter_in_model(config, model, "c")
    return injected


def test_what_only_peft_has_is_answered_on_models_that_it_has_met() -> None:
    alone: Any = adapted()[0]
    assert not any(hasattr(alone, name) for name in PeftLayerMethods.names)
    layer: Any = in_peft(use_dora=True)[0]
    assert layer.adapter_layer_names == ("lora_A", "lora_B", "lora_magnitude_vector")
    assert layer.other_param_names == ("r", "lora_alpha", "scaling", "lora_dropout")
    assert layer.use_rslora == {"a": False, "b": False, "c": True} and layer.use_dora == {
        "a": True,
        "b": True,
        "c": False,
    }
    assert layer.lora_bias == {"a": False, "b": False, "c": False}
    assert layer._all_available_adapter_names() == ["a", "b", "c"] and layer.supports_lora_conversion("a")
    assert layer._cast_input_dtype(X, torch.float64).dtype == torch.float64
    layer.cast_input_dtype_enabled = False
    assert layer._cast_input_dtype(X, torch.float64) is X
    layer.remove("b")
    assert layer.use_rslora == {"a": False, "c": True}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_pickles_and_stand_ins_answer_for_peft_too(again: Any) -> None:
    layer: Any = again(in_peft(lora_bias=True))[0]
    fast: Any = make_replacement(layer, {})
    for one in (layer, fast):
        assert one.lora_bias == {"a": True, "b": True, "c": False} and one.adapter_layer_names == ("lora_A", "lora_B")


def test_scales() -> None:
    layer: Any = adapted(lora_alpha=8)[0]
    layer.set_scale("a", 0.5)
    layer.set_scale("nobody", 0.5)
    assert layer.scaling == {"a": 2.0, "b": 4.0}
    layer.scale_layer(3)
    assert layer.scaling == {"a": 6.0, "b": 4.0}
    layer.unscale_layer(3)
    assert layer.scaling["a"] == 2.0
    layer.unscale_layer()
    assert layer.scaling["a"] == 4.0


def test_the_delta_lies_as_the_weight_does() -> None:
    model = adapted()
    layer: Any = model[0]
    with disable(model):
        plain = layer(X)
    torch.testing.assert_close(layer(X) - plain, X @ layer.get_delta_weight("a").T)


def test_one_layer_merges_alone_and_the_model_goes_on() -> None:
    model = adapted()
    before, bits = model(X), model[0].base_layer.weight.clone()
    model[0].merge()
    assert model[0].merged_adapters == ["a"] and model[1].merged_adapters == []
    torch.testing.assert_close(model(X), before)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model[0].merge()
    with pytest.raises(TypeError, match="should be a list of strings"):
        model[0].merge(adapter_names="a")
    model[0].unmerge()
    assert torch.equal(model[0].base_layer.weight, bits) and torch.equal(model(X), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model[0].unmerge()


def test_another_adapter_merged_in_one_layer_acts_there_alone() -> None:
    model, twin = adapted(), adapted()
    model[0].merge(adapter_names=["b"])
    twin[0].set_adapter(["a", "b"])
    torch.testing.assert_close(model(X), twin(X))
    assert model[1].active_adapters == ["a"]


def test_switching() -> None:
    model = adapted()
    layer: Any = model[0]
    assert (layer.active_adapter, layer.disable_adapters) == ("a", False)
    layer.enable_adapters(False)
    layer.enable_adapters(False)
    assert (layer.active_adapter, layer.disable_adapters) == ("a", True)
    assert torch.equal(layer(X), layer.base_layer(X))
    assert copy.deepcopy(model)[0].disable_adapters
    layer.enable_adapters(True)
    layer.set_adapter(["a", "b"], inference_mode=True)
    assert layer.active_adapter == ["a", "b"] and not any(p.requires_grad for p in layer.parameters())
    layer.set_requires_grad("b")
    assert layer.lora_A["b"].weight.requires_grad and not layer.lora_A["a"].weight.requires_grad
    with use(model, "b"):
        assert model[1].active_adapters == ["b"]
    with disable(model):
        assert model[1].active_adapters == ["a"] and model[1].disable_adapters
    with pytest.raises(RouteError, match="Adapter 'c' not found"):
        layer.set_adapter("c")


def test_a_default_is_laid_aside_and_taken_up() -> None:
    model = adapted()
    state, before = model[0].state, model(X)
    state.suspend_default()
    state.suspend_default()
    assert model[0].disable_adapters and model[0].active_adapters == ["a"] and not torch.equal(model(X), before)
    state.restore_default()
    assert torch.equal(model(X), before)


def test_the_walk_has_the_names_and_order_of_torch() -> None:
    model = adapted()
    every = [(name, module) for name, module in model.named_modules() if ".lora_" not in name]
    assert list(walk(model)) == every
    shared = nn.Linear(2, 2)
    twice = nn.Sequential(shared, nn.Sequential(shared))
    assert list(walk(twice)) == list(twice.named_modules())


def test_condition_numbers() -> None:
    assert condition_number(torch.diag(torch.tensor([6.0, 2.0]))) == pytest.approx(3)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(9, 9))
    assert KappaTuneSelector(model, max_dim_size_to_analyze=4).get_best_targets() == ["0"]
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.stack([torch.eye(2), 2 * torch.eye(2)]))
    selector = KappaTuneSelector(nn.Sequential(experts), 4, [".down_proj"])
    assert selector.get_best_target_parameters(threshold=1.001) == ["0.down_proj"]
    assert selector.get_best_target_parameters(threshold=0.999) == []


def test_what_cannot_be_merged_is_a_value_error_and_a_runtime_error() -> None:
    model = adapted()
    with torch.no_grad():
        model[0].lora_B["a"].weight.fill_(float("nan"))
    for kind in (ValueError, RuntimeError, MergeError):
        with pytest.raises(kind, match="NaNs detected in the merged weights"):
            merge(model)


def test_a_bias_of_B_that_is_not_finite_is_not_merged() -> None:
    model = adapted(lora_bias=True)
    before = model[0].base_layer.bias.clone()
    with torch.no_grad():
        model[0].lora_B["a"].bias.fill_(float("inf"))
    with pytest.raises(MergeError, match="NaNs detected in the merged weights: the bias of B in a is NaN or infinite"):
        merge(model)
    assert torch.equal(model[0].base_layer.bias, before) and model[0].merged_adapters == []


@pytest.mark.parametrize(("fields", "expected"), [({"use_dora": True}, True), ({"kasa_config": {}}, False)])
def test_whether_conversion_is_supported_is_what_conversion_does(fields: dict[str, Any], expected: bool) -> None:
    config = LoraConfig(target_modules=["0"], r=4, **fields)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    assert model.supports_lora_conversion() is expected
    assert model.base_model.model[0].supports_lora_conversion() is expected
    with contextlib.nullcontext() if expected else pytest.raises(AdapterError, match="KaSA"):
        convert_to_lora(model, 2)


def test_assigning_the_active_adapter_activates_it_in_one_layer() -> None:
    model: Any = adapted()
    with use(model, "b"):
        expected = model[0](X)
    flags = [p.requires_grad for p in model.parameters()]
    assert model[0]._active_adapter == model[0].active_adapter
    model[0]._active_adapter = "b"
    assert (model[0].active_adapters, model[0]._active_adapter) == (["b"], "b")
    assert torch.equal(model[0](X), expected) and flags == [p.requires_grad for p in model.parameters()]
    with pytest.raises(RouteError):
        model[0]._active_adapter = "c"
    assert model[0].active_adapters == ["b"]
    model[0].enable_adapters(False)
    model[0]._active_adapter = ["a"]
    assert model[0].disable_adapters and model[0].active_adapters == ["a"]


def test_the_output_projection_of_an_attention_module_is_the_plain_one() -> None:
    base = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    plain = base["mha"].out_proj
    layer: Any = get_peft_model(base, LoraConfig(target_modules=["mha"], r=2)).base_model.model["mha"]
    assert layer.out_proj is plain and layer.base_layer.out_proj is not plain


@pytest.mark.parametrize("groups", [2, 3, 7])
def test_compressed_inputs_of_velora_are_pefts(groups: int) -> None:
    theirs = pytest.importorskip("peft.tuners.lora.velora")
    ours = importlib.import_module("lorakit.peft.tuners.lora.velora")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10)
    assert ours._reshape_to_grouped_subtokens(x, num_groups=groups).equal(
        theirs._reshape_to_grouped_subtokens(x, num_groups=groups)
    )
    v = ours._normalize_projection(torch.randn(-(-10 // groups)))
    torch.testing.assert_close(theirs._normalize_projection(v * 3), v)
    lengths = ours._compress_activations(x, v, num_groups=groups)
    torch.testing.assert_close(theirs._compress_activations(x, v, num_groups=groups), lengths)


@pytest.mark.parametrize(("init", "before"), [("random", True), ("batch_average_once", False)])
def test_a_layer_shows_whether_its_projection_is_set(init: str, before: bool) -> None:
    config: dict[str, Any] = {"init_type": init, "num_groups": 2}
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], velora_config=config))
    layer = model.base_model.model[0]
    assert layer.lora_velora_initialized == {"default": before}
    model(torch.randn(2, 4)).sum().backward()
    assert layer.lora_velora_initialized == {"default": True}
