"""peft's layers are recognized by identity: what only looks like one runs its own forward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorakit import LoraConfig, core
from lorakit.speed import accelerate
from lorakit.speed.contract import is_adapted, is_peft_linear
from lorakit.speed.linear import peft_operand

from ..small_models import llama
from .test_acceleration import recipes
from .test_acceleration_over_peft import wrapped
from .test_contract import IDS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls it


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def are_close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def layers_of(model: Any, name: str = "q_proj") -> list[Any]:
    return [module for path, module in model.named_modules() if path.endswith(name) and hasattr(module, "base_layer")]


def doubled(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return 2 * self.base_layer(x)


class Sub(Linear):  # type: ignore[misc]
    """A subclass that computes something else."""

    forward = doubled


class Inheriting(Linear):  # type: ignore[misc]
    """A subclass with the same `forward`, in which another adapter is active."""

    @property
    def active_adapters(self) -> list[str]:
        return []


def of_the_same_name() -> type[nn.Module]:
    """Return a class with the names of peft's class, whose forward has the names of peft's."""
    members = {"forward": functools.wraps(Linear.forward)(doubled), "__module__": Linear.__module__}
    members |= {"__qualname__": Linear.__qualname__, "__doc__": None}
    return type("Linear", (Linear,), members)


def with_the_same_forward() -> type[nn.Module]:
    """Return a class that calls itself otherwise."""
    return type("Linear", (Linear,), {"__call__": doubled, "__module__": Linear.__module__})


OTHERS: dict[str, type[nn.Module]] = {
    "subclass": Sub,
    "subclass with the same forward": Inheriting,
    "class of the same name": of_the_same_name(),
    "class of the same name with the same forward": with_the_same_forward(),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("when", ["before", "later"])
def test_classes_that_only_look_like_pefts_run_themselves(other: str, when: str) -> None:
    model = wrapped("llama").eval()
    plain = copy.deepcopy(model)
    usual = logits_of(plain)
    put_in(plain, OTHERS[other])
    theirs = logits_of(plain)
    assert not are_close(theirs, usual)
    if when == "before":
        put_in(model, OTHERS[other])
        assert not {"decoder layer", "attention"} & recipes(accelerate(model))
    else:
        assert {"decoder layer", "attention"} <= recipes(accelerate(model))
        put_in(model, OTHERS[other])
    assert not any(is_peft_linear(layer) or is_adapted(layer) for layer in layers_of(model))
    assert are_close(logits_of(model), theirs)


def put_in(model: Any, kind: type[nn.Module]) -> None:
    """Put layers of a class in place of peft's layers; they share the state of the layers that they replace."""
    for attention in [module for path, module in model.named_modules() if path.endswith("self_attn")]:
        made = object.__new__(kind)
        made.__dict__ = attention._modules["q_proj"].__dict__
        attention._modules["q_proj"] = made


INSIDE: dict[str, tuple[type, str, Any]] = {
    "forward": (Linear, "forward", doubled),
    "method": (BaseTunerLayer, "_cast_input_dtype", lambda self, x, dtype: 3 * x),
    "property": (BaseTunerLayer, "active_adapters", property(lambda self: [])),
}


@pytest.mark.parametrize("what", INSIDE)
@pytest.mark.parametrize("when", ["before", "later"])
def test_what_pefts_forward_runs_replaced(what: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama").eval()
    plain = copy.deepcopy(model)
    usual = logits_of(plain)
    if when == "later":
        assert {"decoder layer", "attention"} <= recipes(accelerate(model))
        assert are_close(logits_of(model), usual)
    monkeypatch.setattr(*INSIDE[what])
    theirs = logits_of(plain)
    assert not are_close(theirs, usual)
    if when == "before":
        assert not {"decoder layer", "attention", "adapted linear"} & recipes(accelerate(model))
    assert are_close(logits_of(model), theirs)
    monkeypatch.undo()
    if when == "later":
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)  # fused again
        assert are_close(logits_of(model), usual)


def test_the_code_of_pefts_forward_changed_in_place_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama").eval()
    plain = copy.deepcopy(model)
    accelerate(model)
    monkeypatch.setattr(Linear.forward, "__code__", doubled.__code__)
    theirs = logits_of(plain)
    assert are_close(logits_of(model), theirs)


@pytest.mark.parametrize("what", INSIDE)
def test_what_pefts_forward_runs_replaced_after_peft_was_attached_to_an_accelerated_model(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = llama(use_cache=False).eval()
    plain = copy.deepcopy(base)
    accelerate(base)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}

    def attached(one: Any) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(one, peft.LoraConfig(**settings)).eval()

    model, plain = attached(base), attached(plain)
    usual = logits_of(plain)
    assert are_close(logits_of(model), usual)
    monkeypatch.setattr(*INSIDE[what])
    theirs = logits_of(plain)
    assert not are_close(theirs, usual) and are_close(logits_of(model), theirs)
    monkeypatch.undo()
    assert are_close(logits_of(model), usual)


class Wrapper(nn.Module):
    """A module with a `base_layer` that is not an adapter layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


PARTS: dict[str, Callable[[Any], tuple[nn.Module, str]]] = {
    "linear": lambda layer: (layer.self_attn, "q_proj"),
    "norm": lambda layer: (layer, "input_layernorm"),
    "activation": lambda layer: (layer.mlp, "act_fn"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("when", ["before", "later"])
def test_other_modules_with_a_base_layer_run_themselves(part: str, when: str) -> None:
    torch.manual_seed(0)
    model = llama(use_cache=False).eval()
    core.attach(model, LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False), seed=1)
    plain = copy.deepcopy(model)
    usual = logits_of(plain)

    def change(one: Any) -> None:
        for layer in one.model.layers:
            holder, name = PARTS[part](layer)
            holder._modules[name] = Wrapper(holder.get_submodule(name)).eval()

    if when == "later":
        assert "decoder layer" in recipes(accelerate(model))
    change(model)
    change(plain)
    theirs = logits_of(plain)
    assert not are_close(theirs, usual)
    if when == "before":
        around = {"linear": "attention", "norm": "decoder layer", "activation": "feed-forward"}[part]
        assert around not in recipes(accelerate(model))
    assert are_close(logits_of(model), theirs)


def test_pefts_own_layers_are_recognized() -> None:
    layer = layers_of(wrapped("llama"))[0]
    assert is_peft_linear(layer) and is_adapted(layer) and peft_operand(layer) is not None
    assert not is_adapted(nn.Linear(2, 2)) and not is_peft_linear(nn.Linear(2, 2))
