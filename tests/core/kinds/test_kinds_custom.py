"""Kinds that users define: passed to the call, named with the adapter, and required again to load it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.layers.named_layers import Linear
from lorakit.errors import AdapterFileError, ConfigError, TargetError


class Squared(nn.Module):
    """x -> (W x)², with a weight of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.table.T) ** 2


class Model(nn.Module):
    """One such module between two dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own, self.last = nn.Linear(3, 4), Squared(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.own(self.first(x)))


def table_slots(module: nn.Module) -> tuple[core.WeightSpec, ...]:
    """The one weight of a `Squared`."""
    return (core.WeightSpec("table", 5, 4),)


SQUARED = dataclasses.replace(core.kind_named("Parameter"), name="Squared", types=(Squared,), specs=table_slots)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def adapted(*names: str) -> nn.Module:
    """A model with adapters of that kind that differ in every number."""
    torch.manual_seed(0)
    model = Model().eval()
    for seed, name in enumerate(names):
        core.attach(model, LoraConfig(r=2, lora_alpha=4, target_modules=["own", "last"]), name, kinds=[SQUARED])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in core.trainable_parameters(model, name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(model: nn.Module, name: str) -> Tensor:
    """The output, from the formula."""
    site, last = model.own, model.last  # type: ignore[union-attr]
    A, B = site.lora_A[name].weight, site.lora_B[name].weight
    h = (model.first(X) @ (site.base_layer.table + 2 * B @ A).T) ** 2
    A, B = last.lora_A[name].weight, last.lora_B[name].weight
    return last.base_layer(h) + 2 * h @ A.T @ B.T


def test_without_the_kind_the_module_cannot_be_a_target() -> None:
    with pytest.raises(TargetError, match="named by 'own', is a Squared"):
        core.attach(Model(), LoraConfig(target_modules=["own"]))


def test_it_adapts_by_its_own_formula() -> None:
    model = adapted("a", "b")
    for name in ("a", "b"):
        with core.use(model, name):
            torch.testing.assert_close(model(X), by_hand(model, name))


def test_a_later_adapter_needs_no_kind_again_and_detaching_leaves_the_plain_model() -> None:
    plain, model = adapted(), adapted("a")
    core.attach(model, LoraConfig(r=1, target_modules=["own"]), "c")
    assert model.own.r == {"a": 2, "c": 1}
    core.detach(model)
    assert isinstance(model.own, Squared)
    assert torch.equal(model(X), plain(X))


def test_merged_is_unmerged_and_bits_come_back() -> None:
    model = adapted("a")
    y, before = model(X), model.own.base_layer.table.clone()
    core.merge(model)
    torch.testing.assert_close(model(X), y)
    core.unmerge(model)
    assert torch.equal(model.own.base_layer.table, before)


def test_a_copied_model_keeps_it() -> None:
    model = adapted("a")
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_it_is_named_in_the_folder_and_asked_for_when_loading(tmp_path: Path) -> None:
    model = adapted("a")
    core.save_adapter(model, tmp_path, "a")
    assert json.loads((tmp_path / "lorakit.json").read_text())["kinds"] == ["Squared"]
    fresh = adapted()
    bits = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"custom kinds of site: Squared\. Pass them"):
        core.load_adapter(fresh, tmp_path)
    assert fresh.state_dict().keys() == bits.keys()
    core.load_adapter(fresh, tmp_path, kinds=[SQUARED])
    assert torch.equal(fresh(X), model(X))
    assert core.inspect_adapter(tmp_path).facts["kinds"] == ["Squared"]


def test_an_adapter_without_such_sites_names_none(tmp_path: Path) -> None:
    model = adapted("a")
    core.attach(model, LoraConfig(r=1, target_modules=["last"]), "dense")
    core.save_adapter(model, tmp_path, "dense")
    assert "kinds" not in json.loads((tmp_path / "lorakit.json").read_text())


class MyLinear(Linear):
    """A layer class of one's own."""


def test_a_kind_may_bring_a_layer_class_and_stand_in_for_the_tables_own() -> None:
    kind = dataclasses.replace(core.kind_named("Linear"), name="Mine", types=(nn.Linear,), layer=MyLinear)
    model = adapted()
    y = model(X)
    core.attach(model, LoraConfig(target_modules="all-linear"), kinds=[kind])
    assert type(model.first) is MyLinear
    assert torch.equal(model(X), y)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (dataclasses.replace(SQUARED, name="Linear"), "the kind 'Linear' has a name that is already taken"),
        (dataclasses.replace(SQUARED, types=()), "the kind 'Squared' lists no module types"),
        ("Squared", "kinds contains 'Squared'; each entry must be a lorakit.core.Kind"),
    ],
    ids=["taken", "without types", "no kind"],
)
def test_what_cannot_be_a_kind_is_refused(kind: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        core.attach(Model(), LoraConfig(target_modules=["first"]), kinds=[kind])  # type: ignore[list-item]


def test_a_variant_that_is_not_for_every_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Squared does not support DoRA; set use_dora to False"):
        core.attach(Model(), LoraConfig(target_modules=["own"], use_dora=True), kinds=[SQUARED])
