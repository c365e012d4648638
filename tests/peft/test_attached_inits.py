"""EVA for an existing adapter; equality with peft is tested in tests/conformance/test_inits.py."""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import nn

from lorakit.peft import EvaConfig, LoraConfig, get_peft_model
from lorakit.peft.tuners.lora.eva import get_eva_state_dict


def test_an_input_without_a_batch_axis_is_one_row() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig())
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), config)
    batches = list(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    found = get_eva_state_dict(
        model,
        batches,
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    assert {path: tuple(directions.shape) for path, directions in found.items()} == {"base_model.model.0": (2, 4)}


def test_a_namedtuple_is_a_batch() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig())
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), config)
    Batch = namedtuple("Batch", ["x", "y"])
    batches = [Batch(x, 0) for x in torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1))]
    found = get_eva_state_dict(
        model,
        batches,
        forward_fn=lambda m, batch: m(batch.x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    assert list(found) == ["base_model.model.0"]
