"""Modules wrapped by torch.compile or by activation checkpointing: names on disk are those of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lorakit.config import LoraConfig
from lorakit.core import (
    attach,
    detach,
    fingerprint,
    load_adapter,
    merge,
    merged_state_dict,
    save_adapter,
    sites,
    unmerge,
)
from lorakit.core.model.index import WRAPPERS, without_wrappers
from lorakit.errors import TargetError
from lorakit.peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from lorakit.peft.utils.hotswap import hotswap_adapter

IDS = torch.tensor([[1, 2, 3, 4, 5]])
FIELDS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "down_proj"]},
    "everything": {
        "target_modules": "all-linear",
        "modules_to_save": ["norm"],
        "trainable_token_indices": [3, 4],
    },
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
}


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": compiled,
    "checkpoint_wrapper": checkpoint_wrapper,
    "both": lambda module: compiled(checkpoint_wrapper(module)),
}


def wrap(model: Any, how: str) -> Any:
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = WRAP[how](block)
    return model


def config(name: str) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, **FIELDS[name])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def noisy(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.costly
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", WRAP)
@pytest.mark.parametrize("name", FIELDS)
def test_files_have_plain_names_and_load_in_both_forms(
    name: str, how: str, when: str, tiny_llama: Any, tmp_path: Path
) -> None:
    plain, other = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    attach(plain, config(name), seed=1)
    noisy(plain)
    save_adapter(plain, tmp_path / "plain")
    model = wrap(tiny_llama, how) if when == "before" else tiny_llama
    attach(model, config(name), seed=1)
    model = wrap(model, how) if when == "after" else model
    noisy(model)
    save_adapter(model, tmp_path / "wrapped")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert [site.path for site in sites(model)] == [site.path for site in sites(plain)]
    assert fingerprint(model) == fingerprint(plain)
    y = logits(plain)
    torch.testing.assert_close(logits(model), y)
    report = load_adapter(other, tmp_path / "wrapped")
    assert not report.warnings and torch.equal(logits(other), y)
    detach(other)
    again = wrap(other, how)
    assert not load_adapter(again, tmp_path / "plain").warnings
    torch.testing.assert_close(logits(again), y)
    if name != "everything":  # tied embeddings
        merged = merged_state_dict(model)
        assert merged.keys() == merged_state_dict(plain).keys()
        merge(model)
        torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)
        unmerge(model)
    detach(model)
    detach(other)
    torch.testing.assert_close(logits(model), logits(other))


def test_a_whole_compiled_model(tiny_llama: Any, tmp_path: Path) -> None:
    plain = copy.deepcopy(tiny_llama)
    attach(plain, config("LoRA"), seed=1)
    save_adapter(plain, tmp_path / "plain")
    model = compiled(tiny_llama)
    attach(model, config("LoRA"), seed=1)
    save_adapter(model, tmp_path / "compiled")
    read = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "compiled")]
    assert read[0] == read[1]
    torch.testing.assert_close(logits(model), logits(plain))
    detach(model)
    assert not load_adapter(model, tmp_path / "plain").warnings


@pytest.mark.parametrize("how", WRAP)
def test_pefts_functions_use_plain_names_on_disk(how: str, tiny_llama: Any, tmp_path: Path) -> None:
    plain = get_peft_model(copy.deepcopy(tiny_llama), config("LoRA"))
    plain.save_pretrained(tmp_path / "plain")
    y = logits(plain.eval())
    model = PeftModel.from_pretrained(wrap(copy.deepcopy(tiny_llama), how), tmp_path / "plain")
    torch.testing.assert_close(logits(model), y)
    assert set(get_peft_model_state_dict(model)) == set(get_peft_model_state_dict(plain))
    model.save_pretrained(tmp_path / "wrapped")
    assert (
        load_file(tmp_path / "wrapped" / "adapter_model.safetensors").keys() == get_peft_model_state_dict(plain).keys()
    )
    twice = {key: 2 * tensor for key, tensor in get_peft_model_state_dict(model).items()}
    result = set_peft_model_state_dict(model, twice)
    assert not result.unexpected_keys
    assert all(torch.equal(tensor, twice[key]) for key, tensor in get_peft_model_state_dict(model).items())
    assert not model.load_adapter(tmp_path / "plain", "default").unexpected_keys
    torch.testing.assert_close(logits(model.eval()), y)
    if how != "checkpoint_wrapper":
        return
    hotswap_adapter(model, str(tmp_path / "plain"), "default")
    torch.testing.assert_close(logits(model), y)


def test_files_with_the_names_of_wrappers_load(tiny_llama: Any, tmp_path: Path) -> None:
    """peft saves such names from a model with compiled blocks."""
    model = copy.deepcopy(tiny_llama)
    attach(model, config("LoRA"), seed=1)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    named = {key.replace(".self_attn", "._orig_mod.self_attn"): tensor for key, tensor in load_file(path).items()}
    assert any("_orig_mod" in key for key in named)
    save_file(named, path)
    (tmp_path / "lorakit.json").unlink()
    load_adapter(tiny_llama, tmp_path)
    assert torch.equal(logits(tiny_llama), logits(model))


def test_targets_may_be_written_with_the_names_of_wrappers(tiny_llama: Any) -> None:
    model = wrap(tiny_llama, "torch.compile")
    names = [path for path, module in model.named_modules() if path.endswith("q_proj")]
    assert all("_orig_mod" in name for name in names)
    attach(model, LoraConfig(r=2, target_modules=names))
    assert [site.path for site in sites(model)] == [without_wrappers(name) for name in names]


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}]
)
def test_a_module_that_is_compiled_itself_is_an_error_that_changes_nothing(
    fields: dict[str, Any], tiny_llama: Any
) -> None:
    attention = tiny_llama.model.layers[1].self_attn
    attention.q_proj = compiled(attention.q_proj)
    before = list(tiny_llama.named_parameters())
    with pytest.raises(TargetError) as caught:
        attach(tiny_llama, LoraConfig(r=2, **fields))
    assert (caught.value.where, caught.value.field) == ("model.layers.1.self_attn.q_proj", "target_modules")
    assert [name for name, _ in tiny_llama.named_parameters()] == [name for name, _ in before]
    attach(tiny_llama, LoraConfig(r=2, target_modules=["v_proj"]))


def test_a_module_that_is_checkpointed_itself_is_adapted(tiny_llama: Any) -> None:
    plain = copy.deepcopy(tiny_llama)
    attention = tiny_llama.model.layers[1].self_attn
    attention.q_proj = checkpoint_wrapper(attention.q_proj)
    for model in (plain, tiny_llama):
        attach(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), seed=1)
    assert torch.equal(logits(plain), logits(tiny_llama))


def test_an_adapted_layer_that_is_compiled_stays_adapted(tiny_llama: Any, tmp_path: Path) -> None:
    attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), seed=1)
    y = logits(tiny_llama)
    attention = tiny_llama.model.layers[1].self_attn
    attention.q_proj = compiled(attention.q_proj)
    torch.testing.assert_close(logits(tiny_llama), y)
    save_adapter(tiny_llama, tmp_path)
    assert not any(word in key for key in load_file(tmp_path / "adapter_model.safetensors") for word in WRAPPERS)
    merge(tiny_llama)
    torch.testing.assert_close(logits(tiny_llama), y, rtol=1e-4, atol=1e-5)
    unmerge(tiny_llama)
    detach(tiny_llama)
    assert not torch.allclose(logits(tiny_llama), y)
