"""Adapted modules that were moved to another model or replaced by hand, and calls on a model with such modules."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.errors import AdapterError
from lorakit.peft import get_peft_model
from lorakit.speed import accelerate

IDS = torch.tensor([[1, 2, 3, 4, 5]])
PATH = "model.layers.0.self_attn.q_proj"


def adapted(base: Any, *names: str, **fields: Any) -> Any:
    for number, name in enumerate(names or ("default",)):
        options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **fields}
        core.attach(base, LoraConfig(**options), name, seed=number)
    return base


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "save": lambda model, folder: core.save_adapter(model, folder),
    "merge": lambda model, _: core.merge(model),
    "merge and unload": lambda model, _: core.merge_and_unload(model),
    "merged state dict": lambda model, _: core.merged_state_dict(model),
    "activate": lambda model, _: core.activate(model, "default"),
}


@pytest.mark.costly
@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_a_replaced_module_is_an_error_that_names_it(call: str, is_kept: bool, tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama)
    old: Any = attention(model).q_proj
    attention(model).q_proj = nn.Linear(32, 32, bias=False)
    if not is_kept:
        old = None
        gc.collect()
    y = model(IDS).logits
    for _ in range(2):
        with pytest.raises(AdapterError) as caught:
            CALLS[call](model, tmp_path / "adapter")
        assert (caught.value.where, caught.value.what) == (PATH, "default")
    assert not (tmp_path / "adapter").exists() and torch.equal(model(IDS).logits, y)
    if old is not None:
        attention(model).q_proj = old
        CALLS[call](model, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["norm", "embed_tokens"])
def test_a_saved_module_and_an_embedding_that_are_replaced(name: str, tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama, modules_to_save=["norm"], trainable_token_indices={"embed_tokens": [1, 2]})
    setattr(model.model, name, getattr(model.model, name).original_module)
    with pytest.raises(AdapterError) as caught:
        core.save_adapter(model, tmp_path)
    assert caught.value.where == f"model.{name}"


def test_the_rest_is_detached_and_the_new_module_stays(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama)
    attention(model).q_proj = new = nn.Linear(32, 32, bias=False)
    core.detach(model)
    assert attention(model).q_proj is new and not core.adapters(model)
    assert not any(isinstance(module, core.LoraLayer) for module in model.modules())
    adapted(model)
    core.save_adapter(model, tmp_path)
    assert len(core.sites(model)) == 2


def test_only_the_adapters_of_the_replaced_module_are_incomplete(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(adapted(tiny_llama, "a"), "b", target_modules=["v_proj"])
    attention(model).q_proj = nn.Linear(32, 32, bias=False)
    core.save_adapter(model, tmp_path / "b", "b")
    core.activate(model, "b")
    core.merge(model, "b")
    core.unmerge(model)
    with pytest.raises(AdapterError):
        core.save_adapter(model, tmp_path / "a", "a")
    core.detach(model, "a")
    core.save_adapter(model, tmp_path / "b", "b")


def test_what_peft_calls_raise_too(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"]))
    attention(tiny_llama).q_proj = nn.Linear(32, 32, bias=False)
    for call in (lambda: model.save_pretrained(tmp_path), lambda: model.set_adapter("default"), model.merge_and_unload):
        with pytest.raises(AdapterError) as caught:
            call()
        assert caught.value.where == PATH
    assert type(attention(model.unload()).q_proj) is nn.Linear


def test_wrapping_removing_and_accelerating_are_not_replacing(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama)
    y = model(IDS).logits
    acceleration = accelerate(model)
    core.activate(model, "default")
    core.save_adapter(model, tmp_path)
    acceleration.undo()
    core.save_adapter(model, tmp_path)
    attention(model).q_proj = nn.Sequential(attention(model).q_proj)
    core.activate(model, "default")
    core.save_adapter(model, tmp_path)
    assert torch.equal(model(IDS).logits, y)
    model.model.layers = model.model.layers[1:]  # a shorter model is a choice
    gc.collect()
    core.save_adapter(model, tmp_path)


def moved(first: Any, second: Any) -> None:
    attention(second).q_proj = attention(first).q_proj


@pytest.mark.parametrize("target", ["q_proj", "v_proj"])
@pytest.mark.parametrize("call", [*CALLS, "detach", "attach"])
def test_a_layer_of_another_model_is_an_error(call: str, target: str, tiny_llama: Any, tmp_path: Path) -> None:
    more = {
        "detach": lambda model, _: core.detach(model),
        "attach": lambda model, _: adapted(model, "other", target_modules=["v_proj"]),
    }
    first, second = adapted(copy.deepcopy(tiny_llama)), adapted(tiny_llama, target_modules=[target])
    own = attention(second).q_proj
    moved(first, second)
    with pytest.raises(AdapterError, match="share a state"):
        {**CALLS, **more}[call](second, tmp_path)
    attention(second).q_proj = own
    {**CALLS, **more}[call](second, tmp_path)


@pytest.mark.parametrize("scope", [core.use, core.disable])
def test_a_block_does_not_leave_out_the_layer_of_another_model(scope: Any, tiny_llama: Any) -> None:
    first, second = adapted(copy.deepcopy(tiny_llama)), adapted(tiny_llama)
    with scope(second, *(["default"] if scope is core.use else [])):
        pass
    moved(first, second)
    with pytest.raises(AdapterError, match="share a state"):
        scope(second, *(["default"] if scope is core.use else []))


def test_a_moved_layer_follows_the_model_that_it_was_adapted_in(tiny_llama: Any) -> None:
    first, second = adapted(copy.deepcopy(tiny_llama)), copy.deepcopy(tiny_llama)
    moved(first, second)
    y = second(IDS).logits
    with core.disable(first):
        assert torch.equal(second(IDS).logits, tiny_llama(IDS).logits)
    assert not torch.equal(y, tiny_llama(IDS).logits)


def test_an_accelerated_model_whose_acceleration_is_not_kept_is_complete() -> None:
    """The original modules of an acceleration that nobody refers to are freed; their replacements remain."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=32, **sizes)).eval()
    core.attach(model, LoraConfig(r=2, target_modules=["query"]))
    accelerate(model)
    gc.collect()
    with core.use(model, None):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    core.activate(model, "default")
