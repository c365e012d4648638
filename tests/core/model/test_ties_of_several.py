"""`ensure_weight_tying` if more than two modules share a weight: the tables of an encoder-decoder and its head."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorakit import LoraConfig
from lorakit.core import (
    attach,
    detach,
    disable,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    trainable_parameters,
    unmerge,
)
from lorakit.core.optimizers import freeze_factors, trained_parts
from lorakit.errors import MergeError

from ...laws.snapshots import same_bits
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import randomise
from ..through_peft import through_peft

FP32 = torch.float32
IDS = torch.tensor([[1, 4, 2], [9, 0, 4]])
TABLES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.linear = nn.Embedding(12, 6), nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(self.embed_tokens(ids))
        return found


class Translating(nn.Module):
    """Four modules with one weight; `shared` only holds it, as in transformers."""

    _tied_weights_keys: ClassVar = {f"{path}.weight": "shared.weight" for path in TABLES[1:]}  # what peft reads

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tied, to_dict=lambda: {"tie_word_embeddings": tied})
        self.shared, self.encoder, self.decoder = nn.Embedding(12, 6), Stack(), Stack()
        self.lm_head = nn.Linear(6, 12, bias=False)
        for module in (self.encoder.embed_tokens, self.decoder.embed_tokens, self.lm_head):
            module.weight = self.shared.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lm_head(self.encoder(ids).tanh() + self.decoder(ids))
        return found


def base(tied: bool = True) -> Any:
    torch.manual_seed(3)
    return Translating(tied).eval()


def adapted(target: str, name: str = "a") -> Any:
    model = base()
    attach(model, LoraConfig(r=2, target_modules=[target, "linear"], ensure_weight_tying=True), name)
    randomise(model, name, 5)
    return model


def tables(model: Any) -> list[torch.Tensor]:
    """Return the output of each of the four modules, (V, d)."""
    with torch.no_grad():
        ids = torch.arange(12)
        looked = [model.get_submodule(path)(ids) for path in TABLES[:-1]]
        return [*looked, model.lm_head(torch.eye(6)).T]


@pytest.mark.parametrize("target", ["lm_head", "shared", "decoder.embed_tokens"])
def test_all_four_act_and_are_trained_as_one(target: str) -> None:
    model = adapted(target)
    for table in tables(model)[1:]:
        assert_close(table, tables(model)[0], FP32)
    assert_differs(tables(model)[0], tables(base())[0], FP32)
    names = [name for name, _ in trainable_parameters(model, "a") if "linear" not in name]
    assert names == ["shared.lora_embedding_A.a", "shared.lora_embedding_B.a"]
    model(IDS).pow(2).mean().backward()
    both = model.shared.lora_embedding_B["a"].grad.clone()
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable_parameters(model, "a")], lr=0.1)
    optimizer.step()
    assert both.abs().sum() > 0
    for table in tables(copy.deepcopy(model))[1:]:
        assert_close(table, tables(model)[0], FP32)
    assert len({part.name for part in trained_parts(model, "a")}) == 6
    assert len(freeze_factors(model, "a")) == 3, "two linear layers and one table"


def test_an_untrained_adapter_changes_nothing_and_all_is_given_back() -> None:
    model = base()
    attach(model, LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True))
    assert same_bits(model(IDS), base()(IDS))
    detach(model)
    assert all(model.get_submodule(path).weight is model.shared.weight for path in TABLES)


def test_saved_and_loaded_by_both(tmp_path: Path) -> None:
    model = adapted("lm_head")
    save_adapter(model, tmp_path / "ours", "a")
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "ours/adapter_model.safetensors")}
    assert {f"{path}.lora_embedding_A" for path in TABLES[:-1]} | {"lm_head.lora_A.weight"} <= names
    fresh = base()
    load_adapter(fresh, tmp_path / "ours", "x")
    assert same_bits(fresh(IDS), model(IDS))
    assert fresh.decoder.embed_tokens.lora_embedding_A["x"] is fresh.shared.lora_embedding_A["x"]
    through_peft(tmp_path, base, lambda made: made(IDS), model(IDS))


def test_a_merge_keeps_them_one() -> None:
    model = adapted("shared")
    wanted, tensors = model(IDS), merged_state_dict(model, "a")
    assert all(torch.equal(tensors[f"{path}.weight"], tensors["shared.weight"]) for path in TABLES)
    merge(model, "a")
    assert_close(model(IDS), wanted, FP32)
    with disable(model):
        assert same_bits(model(IDS), base()(IDS))
    unmerge(model, "a")
    assert same_bits(model(IDS), wanted)
    merge_and_unload(model, "a")
    assert_close(model(IDS), wanted, FP32)
    assert all(model.get_submodule(path).weight is model.shared.weight for path in TABLES)


def test_a_second_adapter_on_one_of_them_alone_is_not_merged_into_all() -> None:
    model = adapted("lm_head")
    attach(model, LoraConfig(r=2, target_modules=["encoder.embed_tokens"]), "b")
    randomise(model, "b", 9)
    merge(model, "a")
    with pytest.raises(MergeError, match=r"encoder\.embed_tokens shares its weight with .*untie=True"):
        merge(model, "b")


def test_a_config_that_says_untied_ties_nothing() -> None:
    """Tensors that happen to be one are left apart where the model's config says `tie_word_embeddings` is off."""
    for fields in (
        {"target_modules": ["lm_head", "linear"]},
        {"target_modules": ["linear"], "modules_to_save": ["lm_head"]},
    ):
        model = base(tied=False)
        report = attach(model, LoraConfig(r=2, ensure_weight_tying=True, **fields))
        assert any("no tied modules were found in the model" in note.text for note in report.notes)
        assert type(model.shared) is nn.Embedding


def test_all_linear_names_no_table() -> None:
    model = base()
    report = attach(model, LoraConfig(r=2, target_modules="all-linear", ensure_weight_tying=True))
    assert any("no tied modules are added" in note.text for note in report.notes)
    assert type(model.shared) is nn.Embedding
