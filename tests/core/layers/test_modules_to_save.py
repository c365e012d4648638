"""Saved modules and trained biases: each adapter has its own copies, and the base keeps the originals."""

from __future__ import annotations

import pytest
import torch

from lorakit import LoraConfig
from lorakit.core import activate, attach, detach, disable, route, use
from lorakit.errors import ConfigError, RouteError

from ...laws.snapshots import same_bits
from ...laws.tolerances import assert_differs
from ...laws.zoo import BERT, randomise, run


def two_with_copies() -> torch.nn.Module:
    model = BERT.model()
    for seed, name in enumerate("ab"):
        attach(model, BERT.config(modules_to_save=["classifier"]), name)
        randomise(model, name, seed)
    return model


def test_each_adapter_has_its_own_copy() -> None:
    model, given = two_with_copies(), BERT.given()
    base = run(BERT.model(), given)
    with use(model, "a"):
        one = run(model, given)
    with use(model, "b"):
        other = run(model, given)
    assert_differs(one, other, torch.float32)
    with disable(model):
        assert same_bits(run(model, given), base)
    assert model.classifier.weight is not model.classifier.original_module.weight
    with use(model, "b"):
        assert model.classifier.weight is model.classifier.modules_to_save["b"].weight


def test_an_override_ends_when_its_adapter_is_detached() -> None:
    model, given = two_with_copies(), BERT.given()
    activate(model, "b")
    expected = run(model, given)
    model.classifier.set_adapter("a")
    detach(model, "a")
    assert same_bits(run(model, given), expected)


def test_two_copies_at_once_are_refused() -> None:
    model = two_with_copies()
    with use(model, "a", "b"), pytest.raises(RouteError, match=r"a and b are active together.*modules_to_save"):
        run(model, BERT.given())


def test_a_copy_and_an_adapter_without_one_go_together() -> None:
    model = two_with_copies()
    attach(model, BERT.config(), "c")
    randomise(model, "c", 3)
    with use(model, "a", "c"):
        found = run(model, BERT.given())
    with use(model, "a"):
        assert_differs(found, run(model, BERT.given()), torch.float32)


def test_only_one_adapter_trains_the_biases() -> None:
    model = BERT.model()
    attach(model, BERT.config(bias="lora_only"), "a")
    with pytest.raises(ConfigError, match="adapter 'a' already trains the base's biases"):
        attach(model, BERT.config(bias="all"), "b")
    detach(model, "a")
    attach(model, BERT.config(bias="all"), "b")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_disable_gives_the_original_bits_where_biases_are_trained(bias: str) -> None:
    given, base = BERT.given(), run(BERT.model(), BERT.given())
    model = BERT.model()
    attach(model, BERT.config(bias=bias), "a")
    attach(model, BERT.config(), "b")
    randomise(model, "a", 1)
    randomise(model, "b", 2)
    with disable(model):
        assert same_bits(run(model, given), base)
    alone = BERT.model()
    attach(alone, BERT.config(), "b")
    randomise(alone, "b", 2)
    with use(model, "b"):
        assert same_bits(run(model, given), run(alone, given))


def test_trained_biases_are_those_that_the_word_says() -> None:
    def trained(bias: str) -> set[str]:
        model = BERT.model()
        attach(model, BERT.config(bias=bias))
        return {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}

    assert trained("none") == set()
    sites = {f"bert.encoder.layer.{i}.attention.self.{w}.base_layer.bias" for i in (0, 1) for w in ("query", "value")}
    assert trained("lora_only") == sites
    every = {name for name, _ in BERT.model().named_parameters() if name.endswith("bias")}
    assert {name.replace(".base_layer", "") for name in trained("all")} == every


def test_a_module_that_takes_words_and_returns_no_tensor_is_copied_too() -> None:
    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = torch.nn.Linear(3, 3), Head()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x=self.inner(x), factor=2.0)["out"]

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, factor: float) -> dict[str, torch.Tensor]:
            return {"out": self.lin(x) * factor}

    from lorakit.config import LoraConfig

    model, x = Body().eval(), torch.randn(2, 3)
    before = run(model, x)
    attach(model, LoraConfig(r=1, target_modules=["inner"], modules_to_save=["head"]))
    assert same_bits(run(model, x), before)
    model(x).sum().backward()
    assert model.head.modules_to_save["default"].lin.weight.grad is not None


class Named(torch.nn.Module):
    """A module whose output is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.inner(x)}


def test_a_mixed_batch_through_a_copy_without_a_tensor_is_refused_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Named()).eval()
    for name in "ab":
        attach(model, LoraConfig(target_modules=["0"], modules_to_save=["1"]), name)
    with route(model, ["a", "b"]), pytest.raises(RouteError, match="output of a saved module is a dict"):
        model(torch.ones(2, 3))
