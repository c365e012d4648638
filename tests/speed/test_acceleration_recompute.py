"""Recomputation in the backward, and work that it skips: nothing is computed below the lowest adapted layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorakit import LoraConfig, core
from lorakit.speed import accelerate
from lorakit.speed.patching import RECOMPUTES

from ..laws.snapshots import bits
from ..small_models import llama
from .test_acceleration import adapted, given, step

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def kept_bytes(model: Any) -> int:
    """Return the bytes of tensors that one forward with labels saves, including weights."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(**given(model))
    return sum(sizes)


@pytest.mark.costly(cases=2)
@pytest.mark.parametrize(
    ("name", "inner"), [("llama", 96), ("gpt2_dropping", 128), ("olmo2", 96), ("phi3", 96), ("opt", 48), ("bert", 48)]
)
def test_a_feed_forward_that_is_not_kept_gives_the_same_bits(name: str, inner: int) -> None:
    model = adapted(name, lora_dropout=0.2)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    sizes = []
    for keep in (True, False):
        acceleration = accelerate(model, keep_feed_forward=keep)
        torch.manual_seed(3)
        found.append(step(model))
        sizes.append(kept_bytes(model))
        acceleration.undo()
        assert not any(RECOMPUTES in module.__dict__ for module in model.modules())
    assert bits(found[0][0]) == bits(found[1][0])
    assert all(bits(found[1][1][key]) == bits(gradient) for key, gradient in found[0][1].items())
    assert sizes[0] - sizes[1] == 2 * 4 * given(model)["input_ids"].numel() * inner  # of two layers in fp32


def test_it_goes_with_checkpointing() -> None:
    model = adapted("llama", lora_dropout=0.2)
    accelerate(model, keep_feed_forward=False)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    wanted = step(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)})
    torch.manual_seed(3)
    again = step(model)
    assert all(bits(again[1][key]) == bits(gradient) for key, gradient in wanted[1].items())


def of_layers(count: int, adapted_ones: list[int]) -> Any:
    """Return an accelerated Llama with this many layers and an adapter on some."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=count, use_cache=False)
    words = {"layers_to_transform": adapted_ones, "init_lora_weights": False, "lora_dropout": 0.1}
    core.attach(model, LoraConfig(r=4, target_modules=LINEAR, **words), seed=1)
    accelerate(model.train(), logits=False)
    return model


def backward_flops(model: Any) -> int:
    """Return the FLOPs of the matmuls of a backward."""
    loss = model(**given(model)).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("count", [2, 5])
def test_below_the_lowest_adapted_layer_nothing_is_recorded_and_nothing_goes_back(count: int) -> None:
    """Two adapted layers on frozen ones save and cost as much in the backward as alone."""
    alone, model = of_layers(2, [0, 1]), of_layers(count, [count - 2, count - 1])
    asked: list[bool] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: asked.append(args[0].requires_grad))
        for layer in model.model.layers
    ]
    model(**given(model))
    for hook in hooks:
        hook.remove()
    assert asked == [False] * (count - 1) + [True]
    assert kept_bytes(model) == kept_bytes(alone)
    assert backward_flops(model) == backward_flops(alone) > 0
