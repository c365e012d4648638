"""Attaching, loading and merging inside `torch.inference_mode`: what was made there can be trained afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core import attach, detach, load_adapter, merge, merge_and_unload, save_adapter, unmerge
from lorakit.errors import ModelError
from lorakit.peft import get_peft_model

from ...laws.snapshots import snapshot
from ...laws.zoo import TIED, run

GIVEN = {"input_ids": torch.tensor([[1, 2, 3]])}
PARTS: dict[str, Any] = {"trainable_token_indices": [1], "modules_to_save": ["norm"]}


def learns(model: nn.Module) -> None:
    """A backward reaches every trained tensor."""
    model(**GIVEN).logits.logsumexp(-1).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > 2
    assert all(p.grad is not None for p in trained)
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_a_fresh_adapter(fields: dict[str, Any]) -> None:
    for make in (attach, get_peft_model):
        model = TIED.model()
        with torch.inference_mode():
            made = make(model, TIED.config(**PARTS, **fields))
        learns(model if make is attach else made)


def test_a_loaded_one_and_a_merged_base(tmp_path: Path) -> None:
    model = TIED.model()
    attach(model, TIED.config(**PARTS, init_lora_weights=False))
    save_adapter(model, tmp_path)
    detach(model)
    before = snapshot(model)
    with torch.inference_mode():
        load_adapter(model, tmp_path, trainable=True)
    learns(model)
    with torch.inference_mode():
        merge(model, "default")
    assert not any(p.is_inference() for p in model.parameters())
    with torch.inference_mode():
        unmerge(model)
    learns(model)
    with torch.inference_mode():
        detach(model)
    assert snapshot(model) == before


def test_a_base_that_was_made_inside() -> None:
    """Inside inference mode results are bit-identical; outside, the call raises before anything changes."""
    with torch.inference_mode():
        model = TIED.model()
        wanted = run(model, GIVEN)
        attach(model, TIED.config(bias="all", init_lora_weights=False, **PARTS))
        adapted = run(model, GIVEN)
        merge(model, "default")
        assert torch.allclose(run(model, GIVEN), adapted, atol=1e-5)
        unmerge(model)
        detach(model)
        assert torch.equal(run(model, GIVEN), wanted)
    before = snapshot(model)
    text = r"was created in torch.inference_mode\(\), so torch cannot train it"
    for call in (lambda: attach(model, TIED.config()), lambda: merge_and_unload(model)):
        with pytest.raises(ModelError, match=text):
            call()
    assert snapshot(model) == before
