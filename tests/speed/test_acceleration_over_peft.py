"""`accelerate` on a model wrapped by the package `peft`: the same results, parameters and files, and exact restoration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

from lorakit.speed import accelerate
from lorakit.speed.contract import is_peft_linear
from lorakit.speed.linear import peft_operand

from ..laws.snapshots import bits
from .test_acceleration import MODELS, close, given, recipes, step

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls it


def wrapped(name: str, dtype: torch.dtype = torch.float32, **words: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    model.config.use_cache = False
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, **words}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


@pytest.fixture
def llama() -> Any:
    return wrapped("llama")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "opt", "neox"])
def test_loss_and_gradients_are_as_before_and_it_is_undone_to_the_bit(name: str) -> None:
    model = wrapped(name, fan_in_fan_out=name == "gpt2")
    keys, modules, theirs = list(model.state_dict()), dict(model.named_modules()), step(model)
    acceleration = accelerate(model)
    assert "adapted linear" in recipes(acceleration)
    assert list(model.state_dict()) == keys
    close(step(model), theirs, 2e-5)
    acceleration.undo()
    assert all(module is modules[path] for path, module in model.named_modules())
    again = step(model)
    assert bits(again[0]) == bits(theirs[0])
    assert all(bits(again[1][key]) == bits(gradient) for key, gradient in theirs[1].items())


def test_whole_layers_take_the_adapters(llama: Any) -> None:
    acceleration = accelerate(llama)
    assert "2 × LlamaDecoderLayer: decoder layer" in str(acceleration)
    assert acceleration.packs


def outputs(model: Any) -> list[Tensor]:
    ids, found = given(model)["input_ids"], []
    with torch.no_grad():
        for names in ("default", "b", ["default", "b"]):
            model.base_model.set_adapter(names)
            found.append(model(input_ids=ids).logits)
        model.base_model.set_adapter("b")
        with model.disable_adapter():
            found.append(model(input_ids=ids).logits)
        model.merge_adapter()
        found.append(model(input_ids=ids).logits)
        model.unmerge_adapter()
        for layer in model.modules():
            if is_peft_linear(layer):
                layer.scale_layer(3.0)
        found.append(model(input_ids=ids).logits)
        for layer in model.modules():
            if is_peft_linear(layer):
                layer.unscale_layer()
        found.append(model(input_ids=ids, adapter_names=["b", "__base__", "default"]).logits)
    return found


@pytest.mark.filterwarnings("ignore:Already unmerged")  # where the second adapter is not
def test_which_adapter_acts_is_asked_at_every_call(llama: Any) -> None:
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    llama.add_adapter("b", peft.LoraConfig(**settings))
    theirs = outputs(llama.eval())
    accelerate(llama)
    for ours, wanted in zip(outputs(llama), theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert len({float(logits.sum()) for logits in theirs}) == 7


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"use_dora": True}, False),
        ({"lora_dropout": 0.5}, True),
    ],
)
def test_what_is_not_plain_runs_itself(words: dict[str, Any], plain: bool) -> None:
    model = wrapped("llama", **words).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    found = peft_operand(layer)
    assert (found is not None) == plain
    wanted = model(**given(model)).logits
    accelerate(model)
    torch.testing.assert_close(model(**given(model)).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_bias_of_b_is_not_passed_over() -> None:
    model = wrapped("qwen2", lora_bias=True, target_modules=["q_proj", "v_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].bias)
    theirs = step(model)
    accelerate(model)
    assert peft_operand(layer) is None
    close(step(model), theirs, 2e-5)


def test_dropout_is_that_of_the_layer_in_training_alone() -> None:
    model = wrapped("llama", lora_dropout=0.25)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert [peft_operand(layer.train(mode)).low.p for mode in (True, False)] == [0.25, 0.0]  # type: ignore[union-attr]
    accelerate(model)
    torch.manual_seed(3)
    first = step(model)
    torch.manual_seed(3)
    again, other = step(model), step(model)
    assert bits(first[0]) == bits(again[0]) != bits(other[0])


def test_a_hook_on_a_carrier_is_still_called(llama: Any) -> None:
    seen: list[int] = []
    llama.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"].register_forward_hook(
        lambda *_: seen.append(1)
    )
    accelerate(llama)
    seen.clear()  # of the probe
    step(llama)
    assert seen == [1]


def test_what_is_saved_is_the_same(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "before")
    accelerate(llama)
    llama.save_pretrained(tmp_path / "after")
    assert {p.name for p in (tmp_path / "before").iterdir()} == {p.name for p in (tmp_path / "after").iterdir()}
    before, after = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def load(model: Any, folder: Path) -> Any:
    model.load_adapter(folder, "again")
    model.set_adapter("again")
    return model


CHANGES: dict[str, Callable[[Any, Path], Any]] = {
    "loaded": load,
    "merged and unloaded": lambda model, _: model.merge_and_unload(),
    "unloaded": lambda model, _: model.unload(),
    "copied": lambda model, _: copy.deepcopy(model),
    "cast": lambda model, _: model.to(torch.float64),
}


@pytest.mark.costly
@pytest.mark.parametrize("change", CHANGES)
def test_what_peft_does_afterwards_is_as_without(change: str, tmp_path: Path) -> None:
    answers = []
    for fast in (False, True):
        model = wrapped("llama").eval()
        if not fast:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.mul_(0.5)
            model.save_pretrained(tmp_path)
            model = wrapped("llama").eval()
        else:
            accelerate(model)
        model = CHANGES[change](model, tmp_path)
        answers.append(model(input_ids=given(model)["input_ids"]).logits)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_ways_of_checkpointing(llama: Any, reentrant: bool) -> None:
    theirs = step(llama)
    accelerate(llama)
    llama.enable_input_require_grads()
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(step(llama), theirs, 2e-5)
