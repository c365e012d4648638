"""Tests of `attach`: its report, allowances, default targets, adapter names and `requires_grad` flags."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import adapters, attach, detach, sites, trainable_parameters
from lorakit.errors import AdapterError, ConfigError, TargetError
from lorakit.targets.resolving import SEVERAL_MODULES

from ...laws.zoo import BERT, EVERY_KIND, GPT2, LINEARS, LLAMA, T5, TIED, with_adapters


def test_the_report() -> None:
    model = GPT2.model()
    report = attach(model, GPT2.config(), "ad")
    assert report.name == "ad" and report.missing == ()
    assert [m.path for m in report.matches] == [site.path for site in sites(model)]
    assert {m.entry for m in report.matches} == {"c_attn", "c_proj"}
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(report.notes) == 1 and report.notes[0].kind == SEVERAL_MODULES


@pytest.mark.parametrize(
    ("specimen", "ends"),
    [(GPT2, {"c_attn"}), (LLAMA, {"q_proj", "v_proj"}), (BERT, {"query", "value"}), (T5, {"q", "v"})],
    ids=["gpt2", "llama", "bert", "t5"],
)
def test_default_targets_are_the_fields(specimen: object, ends: set[str]) -> None:
    model = specimen.model()
    config = LoraConfig(r=2)
    attach(model, config)
    assert {site.path.rpartition(".")[2] for site in sites(model)} == ends
    assert config.target_modules is None and adapters(model)["default"].target_modules == ends


def test_a_rank_that_does_not_fit_is_refused_with_its_site() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(ConfigError, match=r"^1: The rank is 3") as caught:
        attach(model, LoraConfig(r=3, target_modules=["0", "1"]))
    assert (caught.value.where, caught.value.field) == ("1", "r")
    assert not adapters(model)


def test_a_partial_match_with_a_word() -> None:
    model = LINEARS.model()
    report = attach(model, LINEARS.config(target_modules=["up", "nope"]), allow=["partial_targets"])
    assert len(report.matches) == 1 and report.missing[0].entry == "nope"
    with pytest.raises(TargetError, match="'nope'"):
        attach(LINEARS.model(), LINEARS.config(target_modules=["nope"]), allow=["partial_targets"])


@pytest.mark.parametrize("name", ["a", "A-b_9", "0", "x" * 100, "lora_A", "weight", "default"])
def test_names_that_are_allowed(name: str) -> None:
    model = LINEARS.model()
    attach(model, LINEARS.config(), name)
    assert list(adapters(model)) == [name]
    detach(model, name)
    assert adapters(model) == {}


@pytest.mark.parametrize(
    "name",
    ["", "a.b", "a/b", "..", "a b", "é", "x" * 101, "type", "keys", "values", "train", "pop", "__init__", "_keys"],
)
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        attach(LINEARS.model(), LINEARS.config(), name)


def test_every_name_that_torchs_containers_use_is_refused_or_works() -> None:
    """Cover every mapping: factors of an embedding and of a matrix, a saved module and trainable token embeddings."""
    words = {word for made in (nn.ModuleDict(), nn.ParameterDict(), nn.Module()) for word in dir(made)}
    config = TIED.config(target_modules=["q_proj"], trainable_token_indices=[1], modules_to_save=["norm"])
    model = TIED.model()
    for name in sorted(words):
        with pytest.raises(AdapterError, match="cannot be an adapter's name"):
            attach(model, config, name)
    for name in (
        "base_layer",
        "original_module",
        "modules_to_save",
        "token_adapter",
        "trainable_tokens_delta",
        "state",
    ):
        attach(model, config, name)
        detach(model, name)


def test_adapters_come_in_their_order_and_on_sites_of_their_own() -> None:
    model = LINEARS.model()
    attach(model, LINEARS.config(target_modules=["square"]), "b")
    attach(model, LINEARS.config(target_modules=["up"]), "a")
    assert list(adapters(model)) == ["b", "a"]
    assert [list(site.layer.r) for site in sites(model)] == [["a"], ["b"]]
    detach(model, "b")
    assert [site.path for site in sites(model)] == ["up"] and type(model.square) is nn.Linear


def test_trainable_parameters_come_once_and_by_adapter() -> None:
    model = with_adapters(BERT, "a", modules_to_save=["classifier"], bias="lora_only")
    attach(model, BERT.config(), "b")
    every = trainable_parameters(model)
    assert len({id(parameter) for _, parameter in every}) == len(every)
    assert {name for name, _ in every} == {n for n, p in model.named_parameters() if p.requires_grad}
    of_b = {name for name, _ in trainable_parameters(model, "b")}
    assert of_b == {name for name, _ in every if name.endswith((".b.weight",))}
    of_a = {name for name, _ in trainable_parameters(model, "a")}
    assert "classifier.modules_to_save.a.bias" in of_a
    assert "bert.encoder.layer.0.attention.self.query.base_layer.bias" in of_a


def test_a_frozen_base_stays_frozen_and_a_trainable_one_comes_back() -> None:
    model = EVERY_KIND.model().requires_grad_(False)
    model.linear.bias.requires_grad_(True)
    attach(model, EVERY_KIND.config())
    assert not model.linear.base_layer.bias.requires_grad
    detach(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["linear.bias"]


def test_subclasses_of_linear_are_taken_with_their_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, x = nn.Sequential(Doubled(4, 4)).eval(), torch.randn(2, 4)
    before = model(x)
    attach(model, LoraConfig(r=1, target_modules=["0"]))
    torch.testing.assert_close(model(x), before)


def test_a_model_that_is_itself_a_site_says_what_to_do() -> None:
    with pytest.raises(TargetError, match="not found"):
        attach(nn.Linear(3, 3), LoraConfig(r=1, target_modules=["weight"]))
