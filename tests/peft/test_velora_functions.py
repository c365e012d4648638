"""PEFT's functions for VeLoRA: values and gradients equal those of the installed peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.peft import LoraConfig, get_peft_model
from lorakit.peft.tuners.lora import velora as ours

theirs = pytest.importorskip("peft.tuners.lora.velora")


@pytest.mark.parametrize("groups", [2, 3, 7])
def test_values_are_pefts(groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10)
    assert ours._reshape_to_grouped_subtokens(x, num_groups=groups).equal(
        theirs._reshape_to_grouped_subtokens(x, num_groups=groups)
    )
    v = ours._normalize_projection(torch.randn(-(-10 // groups)))
    torch.testing.assert_close(theirs._normalize_projection(v * 3), v)
    lengths = ours._compress_activations(x, v, num_groups=groups)
    torch.testing.assert_close(theirs._compress_activations(x, v, num_groups=groups), lengths)
    expected = theirs._reconstruct_activations(lengths, v, 10, 0.5)
    torch.testing.assert_close(ours._reconstruct_activations(lengths, v, 10, 0.5), expected)


@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_are_pefts(has_bias: bool) -> None:
    results = []
    for library in (ours, theirs):
        torch.manual_seed(0)
        x, weight = torch.randn(2, 3, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True)
        bias = torch.randn(4, requires_grad=True) if has_bias else None
        output = library.VeloraFunction.apply(x, weight, bias, ours._normalize_projection(torch.ones(4)), 3, 0.5)
        output.square().sum().backward()
        results.append([output, x.grad, weight.grad, None if bias is None else bias.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("init", "before"), [("random", True), ("batch_average_once", False)])
def test_a_layer_shows_whether_its_projection_is_set(init: str, before: bool) -> None:
    config: dict[str, Any] = {"init_type": init, "num_groups": 2}
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], velora_config=config))
    layer = model.base_model.model[0]
    assert layer.lora_velora_initialized == {"default": before}
    model(torch.randn(2, 4)).sum().backward()
    assert layer.lora_velora_initialized == {"default": True}
