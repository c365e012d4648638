"""A layer's records of its forwards: enough for a recomputation to find its adapter, and no more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.core import attach, disable, route, use
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.routing.recompute import LONGEST_HISTORY
from lorakit.errors import RouteError

from ...laws.zoo import LINEARS, randomise


@pytest.fixture
def model() -> Iterator[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = LINEARS.model()
        for seed, name in enumerate("ab"):
            attach(made, LINEARS.config(), name)
            randomise(made, name, seed + 50)
        yield made


def given() -> Tensor:
    return LINEARS.given().requires_grad_()


def layer_of(model: nn.Module) -> LoraLayer:
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


def wanted(model: nn.Module, name: str) -> Tensor:
    x = given()
    with use(model, name):
        model(x).pow(2).sum().backward()
    model.zero_grad()
    return x.grad


def test_a_forward_that_was_forgotten_is_not_guessed(model: nn.Module) -> None:
    """After 64 changes of adapter the layer no longer has a record of the first run."""
    x = given()
    with use(model, "a"):
        loss = checkpoint(model, x, use_reentrant=True).sum()
    with torch.no_grad():
        for _ in range(LONGEST_HISTORY):
            for name in "ba":
                with use(model, name):
                    model(given())
    with pytest.raises(RouteError, match="cannot be determined"):
        loss.backward()


def test_a_forgotten_forward_is_known_where_all_that_is_forgotten_had_one_adapter(model: nn.Module) -> None:
    x, expected = given(), wanted(model, "a")
    with torch.no_grad(), use(model, "a"):
        model(given())
    runs = layer_of(model).forwards._switched_off._runs
    with use(model, "a"):
        loss = checkpoint(model, x, use_reentrant=True).pow(2).sum()
    with torch.no_grad():
        for number in range(LONGEST_HISTORY):
            with route(model, ["b"] * 4, copies=number + 1):
                model(LINEARS.given().repeat_interleave(number + 1, 0))
    assert [run.route.names for run in runs if run.route.names] == []  # the first run was dropped
    loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_the_memory_of_forwards_without_gradients_is_bounded(model: nn.Module) -> None:
    with torch.no_grad():
        for _ in range(LONGEST_HISTORY):
            for name in "ab":
                with use(model, name):
                    model(given())
    assert len(layer_of(model).forwards._switched_off._runs) == LONGEST_HISTORY


def test_an_evaluation_of_one_adapter_takes_one_entry(model: nn.Module) -> None:
    x, expected = given(), wanted(model, "a")
    with use(model, "a"):
        loss = checkpoint(model, x, use_reentrant=True).pow(2).sum()
    with torch.no_grad(), use(model, "b"):
        for _ in range(LONGEST_HISTORY + 1):
            model(given())
    loss.backward()  # its first run is still known
    torch.testing.assert_close(x.grad, expected)


def test_inference_mode_leaves_nothing(model: nn.Module) -> None:
    x, expected = given(), wanted(model, "a")
    with use(model, "a"):
        loss = checkpoint(model, x, use_reentrant=True).pow(2).sum()
    for name in "ba" * LONGEST_HISTORY:
        with torch.inference_mode(), use(model, name):
            model(LINEARS.given())
    loss.backward()  # its first run was not displaced
    torch.testing.assert_close(x.grad, expected)


def test_copies_and_pickles_remember_nothing(model: nn.Module) -> None:
    with torch.no_grad(), disable(model):
        model(given())
    assert layer_of(model).forwards._switched_off._runs
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not layer_of(made).forwards._switched_off._runs


def test_a_forward_without_gradients_inside_a_checkpoint(model: nn.Module) -> None:
    """Its recomputation runs without gradients too, and has the adapter of its own first run."""
    seen: list[Tensor] = []

    def both(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen.append(model(x))
        return model(x) * seen[-1]

    with torch.no_grad(), disable(model):
        model(given())
    with use(model, "b"):
        loss = checkpoint(both, given(), use_reentrant=True).sum()
    with torch.no_grad(), use(model, "a"):
        model(given())
    loss.backward()
    first, second = seen
    assert torch.equal(first, second)
