"""Adapters for the experts of transformers 4, loaded by the PEFT API."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit.peft as ours
from lorakit.errors import AdapterFileError
from lorakit.peft.utils.hotswap import hotswap_adapter

from .experts import BY_KIND, FAMILIES, Family, each, loss_and_logits, old_tensors, quiet, theirs, write_old

QWEN = BY_KIND["qwen3_moe"]


@pytest.mark.parametrize("is_given", [False, True])
def test_an_old_adapter_lacks_no_keys_and_is_saved_with_current_names(is_given: bool, tmp_path: Path) -> None:
    folder = write_old(tmp_path / "old", old_tensors(QWEN), target_modules=["q_proj", *QWEN.old])
    config = ours.LoraConfig.from_pretrained(folder) if is_given else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ours.PeftModel.from_pretrained(QWEN.model(), folder, config=config)
    assert not any("keys" in str(warning.message) for warning in caught)
    assert model.peft_config["default"].target_modules == {"q_proj"}
    assert model.peft_config["default"].target_parameters == ["down_proj", "gate.weight", "gate_up_proj"]
    with quiet():
        model.save_pretrained(tmp_path / "new")
        again = ours.PeftModel.from_pretrained(QWEN.model(), tmp_path / "new")
    assert torch.equal(loss_and_logits(again)[1], loss_and_logits(model)[1])


OLD = tuple(family for family in FAMILIES if family.old)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def opened(folder: Path, family: Family = QWEN, **options: Any) -> Any:
    """Return a small model with an adapter from a directory."""
    with quiet():
        return ours.PeftModel.from_pretrained(family.model(), folder, **options).eval()


def same_answers(model: Any, expected: Any) -> None:
    """Check that two models have the same loss and logits."""
    for found, wanted in zip(loss_and_logits(model), loss_and_logits(expected), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def old_folder(folder: Path, family: Family = QWEN, **fields: Any) -> Path:
    """Write an adapter for separate experts and return its directory."""
    return write_old(folder, old_tensors(family), target_modules=["q_proj", *family.old], **fields)


def fresh(library: Any, family: Family, **fields: Any) -> Any:
    """Return a small model with a new adapter that targets separate experts by their old names."""
    with quiet():
        config = library.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", *family.old], **fields)
        return library.get_peft_model(family.model(), config).eval()


@pytest.mark.parametrize("family", each(OLD))
def test_a_state_dict_of_separate_experts_is_taken_as_in_peft(family: Family) -> None:
    models = [fresh(library, family) for library in (theirs, ours)]
    for library, model in zip((theirs, ours), models, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = library.set_peft_model_state_dict(model, old_tensors(family))
        assert not result.unexpected_keys
    expected, model = models
    held = theirs.get_peft_model_state_dict(expected), ours.get_peft_model_state_dict(model)
    assert held[0].keys() == held[1].keys() and all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    same_answers(model, expected)


def test_a_state_dict_of_separate_experts_acts_as_the_loaded_adapter_under_rslora(tmp_path: Path) -> None:
    model = fresh(ours, QWEN, use_rslora=True)
    ours.set_peft_model_state_dict(model, old_tensors(QWEN))
    same_answers(model, opened(old_folder(tmp_path, use_rslora=True)))


def test_a_state_dict_without_the_wrappers_prefix_and_with_an_expert_missing() -> None:
    config = ours.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", *QWEN.old])
    with quiet():
        model = ours.inject_adapter_in_model(config, QWEN.model()).eval()
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in old_tensors(QWEN).items()}
    assert ours.set_peft_model_state_dict(model, tensors).unexpected_keys == []
    expected = fresh(ours, QWEN)
    ours.set_peft_model_state_dict(expected, old_tensors(QWEN))
    same_answers(model, expected)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    partial = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.experts.2." not in name}
    with pytest.raises(AdapterFileError, match="lacks expert 2"):
        ours.set_peft_model_state_dict(model, partial)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rslora", [False, True])
def test_old_tensors_with_other_names_are_mapped_and_then_fused(rslora: bool, tmp_path: Path) -> None:
    renamed = {name.replace(".layers.", ".blocks."): tensor for name, tensor in old_tensors(QWEN).items()}
    fields = {"target_modules": ["q_proj", *QWEN.old], "use_rslora": rslora}
    folder = write_old(tmp_path / "renamed", renamed, **fields)
    model = ours.PeftModel(QWEN.model())
    with quiet():
        result = model.load_adapter(folder, "default", key_mapping={r"\.blocks\.": ".layers."})
    assert result == ([], [])
    same_answers(model.eval(), opened(old_folder(tmp_path / "plain", use_rslora=rslora)))
    if not rslora:  # whose scale peft gets wrong
        with quiet():
            expected = theirs.PeftModel.from_pretrained(
                QWEN.model(), folder, key_mapping={r"\.blocks\.": ".layers."}
            ).eval()
        same_answers(model, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_old_adapter_is_swapped_in(rslora: bool, tmp_path: Path) -> None:
    first = old_folder(tmp_path / "first", use_rslora=rslora)
    doubled = {name: 2 * tensor for name, tensor in old_tensors(QWEN).items()}
    second = write_old(tmp_path / "second", doubled, target_modules=["q_proj", *QWEN.old], use_rslora=rslora)
    model, expected = opened(first), opened(second)
    for one in (first, second, first):
        hotswap_adapter(model, one, "default")
    same_answers(model, opened(first))
    hotswap_adapter(model, second, "default")
    same_answers(model, expected)


def test_the_scale_of_a_swapped_parameter_follows_its_patterns(tmp_path: Path) -> None:
    fields = {"target_modules": [], "target_parameters": ["gate_up_proj"], "init_lora_weights": False}
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 20}}
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        with quiet():
            config = ours.LoraConfig(r=2, lora_alpha=6, **fields, **patterns)
            ours.get_peft_model(QWEN.model(), config).save_pretrained(folder)
    model = opened(folders[0])
    hotswap_adapter(model, folders[1], "default")
    same_answers(model, opened(folders[1]))
