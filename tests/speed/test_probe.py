"""State that a block restores: attributes, children, hooks, buffers, forward records, random state; and frozen parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, core
from lorakit.speed import accelerate
from lorakit.speed.probe import frozen, preserved

from ..small_models import llama
from .architectures import architectures, small
from .test_acceleration_every_architecture import changed, held


class Lazy(nn.Module):
    """A module that changes itself in every possible way when called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.inner = nn.Linear(3, 3)
        self.inner.register_forward_hook(lambda *_: None)
        self.seen += 1
        self.register_buffer("cache", x.clone(), persistent=False)
        self.mask = torch.rand(3)
        self.eval()
        made: torch.Tensor = self.inner(x)
        return made


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_as_before(error: type[BaseException] | None) -> None:
    model = nn.Sequential(Lazy(), nn.Dropout())
    before, non_persistent = held(model), set(model[0]._non_persistent_buffers_set)
    try:
        with preserved(model):
            model(torch.ones(2, 3))
            assert {"modules", "attributes", "buffers", "training"} <= set(changed(before, held(model)))
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert not changed(before, held(model))
    assert model[0]._non_persistent_buffers_set == non_persistent


def test_forward_records_are_empty_inside_and_the_same_ones_after() -> None:
    model = llama()
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    layer: Any = model.model.layers[0].self_attn.q_proj
    records = layer.forwards
    with preserved(model):
        assert layer.forwards is not records
    assert layer.forwards is records


def test_parameters_are_frozen_inside_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]


def test_a_model_that_exchanges_its_attention_for_short_rows_keeps_its_own() -> None:
    """BigBird does so permanently the first time it sees a short row, and draws new weights."""
    model = small(*next(one for one in architectures() if one[0] == "big_bird"))
    before = held(model)
    acceleration = accelerate(model)
    assert model.bert.encoder.attention_type == "block_sparse"
    acceleration.undo()
    assert not changed(before, held(model))


def test_what_a_model_caches_in_a_probe_can_be_trained_with() -> None:
    """A table stored outside of every module, as in functions with a cache."""
    model = llama().train()
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    kept: dict[str, torch.Tensor] = {}

    def scaled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * kept.setdefault("scale", torch.full((32,), 2.0))

    model.model.norm.register_forward_hook(scaled)
    accelerate(model).undo()
    assert kept
    ids = torch.arange(18).view(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
