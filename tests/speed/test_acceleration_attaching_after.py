"""Adapters attached to a model after it was accelerated, and detached, in any order: as on the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit.peft
from lorakit import LoraConfig, core
from lorakit.speed import Acceleration, accelerate
from lorakit.speed.patching import is_replacement

from .test_acceleration import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls it

NAMES = ("llama", "qwen3", "gemma2", "gpt2", "neox", "opt", "bert", "t5")
IDS = torch.randint(2, 61, (2, 10), generator=torch.Generator().manual_seed(5))
LABELS = IDS.masked_fill(torch.arange(10) < 7, -100)  # few enough that the last layer may run on their rows only
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "saved block": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "saved attention": {"target_modules": ["gate_proj"], "modules_to_save": ["self_attn"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


def base(name: str = "llama", *, trained: bool = False) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.requires_grad_(trained)


def ours(model: Any, **words: Any) -> Any:
    core.attach(model, LoraConfig(r=4, init_lora_weights=False, **words), seed=1)
    return model


def as_peft(model: Any, **words: Any) -> Any:
    torch.manual_seed(1)
    return lorakit.peft.get_peft_model(model, lorakit.peft.LoraConfig(r=4, init_lora_weights=False, **words))


def by_peft(model: Any, **words: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **words))


WAYS: dict[str, Callable[..., Any]] = {"ours": ours, "lorakit.peft": as_peft, "peft": by_peft}


def moved(model: Any) -> Any:
    """Give every copy of a module weights that differ from the original's."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def results(model: Any) -> dict[str, Tensor]:
    """Return loss and gradients in training mode, logits in eval mode."""
    model.zero_grad()
    trained = model.train()(input_ids=IDS, labels=LABELS)
    trained.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    with torch.no_grad():
        words = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        logits = model.eval()(input_ids=IDS, **words).logits
    model.train()
    made = {} if trained.logits is None else {"logits in training": trained.logits.detach()}
    return {**found, **made, "loss": trained.loss.detach(), "logits": logits}


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() | {"logits in training"} == wanted.keys() | {"logits in training"}
    for key in found.keys() & wanted.keys():
        one = wanted[key]
        assert float((found[key] - one).norm()) <= 3e-5 * float(one.norm()) + 1e-9, key


def stand_ins(model: nn.Module) -> list[str]:
    """Return the paths of all replacements in a model, including second paths of a module."""
    return [path for path, module in model.named_modules(remove_duplicate=False) if is_replacement(module)]


def check_undone(acceleration: Acceleration, model: nn.Module, originals: dict[str, nn.Module]) -> None:
    assert stand_ins(model)
    acceleration.undo()
    assert not stand_ins(model)
    there = {id(module) for module in model.modules()}
    assert all(id(module) in there for module in originals.values())


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_on_an_accelerated_model(name: str, way: str, logits: bool) -> None:
    words = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    wanted = results(WAYS[way](base(name), **words))
    model = base(name)
    originals = dict(model.named_modules())
    acceleration = accelerate(model, logits=logits)
    whole = WAYS[way](model, **words)
    check(results(whole), wanted)
    check_undone(acceleration, model, originals)
    check(results(whole), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gemma2", "t5")])  # not limited to sdpa
def test_an_accelerated_model_with_adapters_is_still_fused(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base(name)
    accelerate(model)
    whole = WAYS[way](model, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    for path, module in model.named_modules():
        if path.endswith(".mlp"):
            monkeypatch.setattr(type(module), "forward", None)  # a fused layer does not call it
    results(whole)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_sort_of_adapter_on_an_accelerated_model(setting: str, way: str, logits: bool) -> None:
    wanted = results(moved(WAYS[way](base(), **SETTINGS[setting])))
    model = base()
    originals = dict(model.named_modules())
    acceleration = accelerate(model, logits=logits)
    whole = moved(WAYS[way](model, **SETTINGS[setting]))
    check(results(whole), wanted)
    check_undone(acceleration, model, originals)
    check(results(whole), wanted)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_attached_accelerated_detached_undone(setting: str, logits: bool) -> None:
    plain = base()
    with torch.no_grad():
        wanted = plain(input_ids=IDS).logits
    model = base()
    originals = dict(model.named_modules())
    ours(model, **SETTINGS[setting])
    with_adapter = results(moved(model))
    acceleration = accelerate(model, logits=logits)
    check(results(model), with_adapter)
    core.detach(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    acceleration.undo()
    assert not stand_ins(model)
    assert dict(model.named_modules()) == originals
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("first", ["detach", "undo"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_accelerated_attached_and_back_in_any_order(setting: str, first: str) -> None:
    model = base()
    originals = dict(model.named_modules())
    acceleration = accelerate(model, logits=False)
    ours(model, **SETTINGS[setting])
    results(model)
    if first == "detach":
        core.detach(model)
        acceleration.undo()
    else:
        acceleration.undo()
        core.detach(model)
    assert not stand_ins(model)
    assert dict(model.named_modules()) == originals


@pytest.mark.parametrize("setting", ["linear", "head", "saved head"])
def test_unloaded_by_peft_and_undone(setting: str) -> None:
    model = base()
    originals = dict(model.named_modules())
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    acceleration = accelerate(model, logits=False)
    whole = by_peft(model, **SETTINGS[setting])
    results(whole)
    unloaded = whole.unload()
    acceleration.undo()
    assert unloaded is model and not stand_ins(model)
    kept = {path: module for path, module in originals.items() if setting != "saved head" or path != "lm_head"}
    assert all(model.get_submodule(path) is module for path, module in kept.items())
    if setting != "saved head":
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_no_logits_are_made_where_the_head_is_plain_and_some_where_it_is_not() -> None:
    model = base().train()
    accelerate(model, logits=False)
    ours(model, target_modules=["q_proj"])
    assert model(input_ids=IDS, labels=IDS).logits is None
    core.detach(model)
    ours(model, target_modules=["q_proj", "lm_head"])
    assert model(input_ids=IDS, labels=IDS).logits is not None
    core.detach(model)
    ours(model, target_modules=["q_proj"])
    assert model(input_ids=IDS, labels=IDS).logits is None


def test_another_head_has_its_own_logits() -> None:
    model, plain = base().train(), base().train()
    accelerate(model, logits=False)
    torch.manual_seed(4)
    head = nn.Linear(32, 61, bias=False).requires_grad_(False)
    model.set_output_embeddings(head)
    plain.set_output_embeddings(copy.deepcopy(head))
    ours(model, target_modules="all-linear")
    ours(plain, target_modules="all-linear")
    check(results(model), results(plain))


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_trained_itself(name: str, logits: bool) -> None:
    wanted = results(base(name, trained=True))
    model = base(name, trained=True)
    acceleration = accelerate(model, logits=logits)
    found = results(model)
    check(found, wanted)
    acceleration.undo()
    check(results(model), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_trained_model_that_gets_adapters(name: str, way: str) -> None:
    words = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    wanted = results(WAYS[way](base(name, trained=True), **words))
    model = base(name, trained=True)
    accelerate(model, logits=False)
    check(results(WAYS[way](model, **words)), wanted)


@pytest.mark.parametrize("part", ["mlp.down_proj", "input_layernorm", "self_attn.q_proj"])
def test_a_base_weight_that_is_trained_later(part: str) -> None:
    def train(model: Any) -> Any:
        model.model.layers[1].get_submodule(part).weight.requires_grad_(True)
        return model

    wanted = results(train(base()))
    model = base()
    accelerate(model)
    check(results(train(model)), wanted)
