"""torch.nn.utils.prune on adapted modules: a hook computes the weight, which can be read but not written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lorakit.config import LoraConfig
from lorakit.core import attach, detach, load_adapter, merge, merge_and_unload, merged_state_dict, save_adapter, unmerge
from lorakit.core.quantization import is_computed
from lorakit.errors import BaseMismatchError, ConfigError, MergeError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()


def pruned(model: nn.Sequential) -> nn.Sequential:
    for number in (0, 2):
        module = model[number]
        prune.l1_unstructured(getattr(module, "base_layer", module), "weight", amount=0.5)
    return model


def permanent(model: nn.Sequential) -> nn.Sequential:
    for number in (0, 2):
        prune.remove(getattr(model[number], "base_layer", model[number]), "weight")
    return model


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **fields)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}])
def test_a_pruned_module_is_adapted_as_the_permanently_pruned_one(fields: dict[str, Any], when: str) -> None:
    plain = permanent(pruned(network()))
    attach(plain, config(**fields), seed=1)
    model = pruned(network()) if when == "before" else network()
    attach(model, config(**fields), seed=1)
    model = pruned(model) if when == "after" else model
    if "use_dora" in fields and when == "after":  # its magnitudes are those of the base when it was attached
        for number in (0, 2):
            model[number].lora_magnitude_vector["default"].weight.data = (
                plain[number].lora_magnitude_vector["default"].weight
            )
    assert is_computed(model[0].base_layer)
    torch.testing.assert_close(model(X), plain(X))
    loss = model.train()(X).square().sum()
    loss.backward()
    assert model[0].lora_B["default"].weight.grad.abs().sum() > 0
    assert model[0].base_layer.weight_orig.grad is None
    with pytest.raises(MergeError, match=r"prune\.remove"):
        merged_state_dict(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("end", [merge, merge_and_unload])
def test_merging_into_a_pruned_weight_is_an_error_that_changes_nothing(end: Any, when: str) -> None:
    model = pruned(network()) if when == "before" else network()
    attach(model, config(), seed=1)
    model = pruned(model) if when == "after" else model
    y, bits = model(X), copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(MergeError) as caught:
        end(model)
    assert (caught.value.where, caught.value.field) == ("0", "weight") and "prune.remove" in str(caught.value)
    assert torch.equal(model(X), y) and all(torch.equal(bits[name], b) for name, b in model.named_buffers())
    end(permanent(model))
    torch.testing.assert_close(model(X), y)


def test_pruning_a_merged_module_is_not_undone_by_half() -> None:
    model = network()
    attach(model, config(), seed=1)
    merge(model)
    pruned(model)
    y = model(X)
    for call in (unmerge, detach):
        with pytest.raises(MergeError, match=r"prune\.remove"):
            call(model)
        assert torch.equal(model(X), y)


def test_inits_that_write_the_base_are_errors() -> None:
    model = pruned(network())
    with pytest.raises(ConfigError, match="cannot be written"):
        attach(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="pissa"))
    assert type(model[0]) is nn.Linear


def test_a_mask_that_was_loaded_counts_before_the_next_forward_pass() -> None:
    """load_state_dict changes `weight_orig` and `weight_mask`, but not the attribute `weight`."""
    model, other = pruned(network()), pruned(network())
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        attach(one, config(use_dora=True), seed=1)
    assert torch.equal(model(X), other(X))


def test_detaching_and_files(tmp_path: Path) -> None:
    model = pruned(network())
    y = model(X)
    attach(model, config(), seed=1)
    with_adapter = model(X)
    save_adapter(model, tmp_path)
    detach(model)
    assert torch.equal(model(X), y) and model[0].weight_orig.requires_grad
    assert load_adapter(model, tmp_path).warnings == ()
    assert torch.equal(model(X), with_adapter)
    with pytest.raises(BaseMismatchError):
        load_adapter(network(), tmp_path)


def test_the_flag_of_a_weight_that_was_pruned_later_is_restored() -> None:
    model = network()
    attach(model, config())
    pruned(model)
    detach(model)
    assert model[0].weight_orig.requires_grad
