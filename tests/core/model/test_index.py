"""The index of a model: sites, parents, shared weights, and the base's tensors under their own names."""

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, core
from lorakit.core.merging import tied_sites
from lorakit.core.model.base_view import base_tensors, float_dtype
from lorakit.core.model.index import AdapterIndex, find_state, state_of
from lorakit.errors import AdapterError


class Shared(nn.Module):
    """One layer in two places, and two embeddings with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.inputs, self.outputs = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.outputs.weight = self.inputs.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.outputs


def test_candidates_have_kinds_and_sizes_and_the_head_is_not_dense() -> None:
    found = {c.path: c for c in AdapterIndex.of(Shared()).candidates}
    assert (found["first"].kind, found["first"].dense) == ("Linear", True)
    assert (found["outputs"].kind, found["outputs"].dense) == ("Linear", False)
    assert (found["inputs"].kind, found["inputs"].dense) == ("Embedding", False)
    assert (found["inputs"].out_features, found["inputs"].in_features) == (4, 6)


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    model = Shared()
    core.attach(model, LoraConfig(target_modules=["first"]))
    assert model.first is model.again and isinstance(model.first, core.LoraLayer)
    assert [site.path for site in core.sites(model)] == ["first"]
    core.detach(model)
    assert model.first is model.again and type(model.first) is nn.Linear


def test_the_bases_tensors_keep_their_names_under_adapters() -> None:
    model = Shared()
    names = [name for name, _, _ in base_tensors(model)]
    before = {name: tensor.clone() for name, tensor, _ in base_tensors(model)}
    core.attach(model, LoraConfig(target_modules=["first", "inputs"], modules_to_save=["outputs"], bias="lora_only"))
    assert [name for name, _, _ in base_tensors(model)] == names
    assert "kept" in names and "passing" not in names
    assert all(torch.equal(tensor, before[name]) for name, tensor, _ in base_tensors(model))


def test_a_tied_weight_is_known() -> None:
    model = Shared()
    core.attach(model, LoraConfig(target_modules=["inputs", "first"]))
    assert tied_sites(model, ["default"]) == [("inputs", "outputs.weight")]


def test_a_quantized_weight_is_no_site() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    (candidate,) = AdapterIndex.of(nn.Sequential(layer)).candidates
    assert candidate.kind is None and candidate.type_name == "Linear"


def test_a_model_without_adapters_has_no_state() -> None:
    assert find_state(Shared()) is None
    with pytest.raises(AdapterError, match="This Shared has no adapters"):
        state_of(Shared())


def test_a_buffer_does_not_decide_the_dtype() -> None:
    """A model of bf16 weights whose first float tensor is a buffer in fp32, such as a table of positions."""
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4).to(torch.bfloat16))
    assert float_dtype(model) == torch.bfloat16
