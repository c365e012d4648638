"""Adapters for the experts of transformers 4, loaded by the PEFT API."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import lorakit.peft as ours

from .experts import BY_KIND, loss_and_logits, old_tensors, quiet, write_old

QWEN = BY_KIND["qwen3_moe"]


@pytest.mark.parametrize("is_given", [False, True])
def test_an_old_adapter_lacks_no_keys_and_is_saved_with_current_names(is_given: bool, tmp_path: Path) -> None:
    folder = write_old(tmp_path / "old", old_tensors(QWEN), target_modules=["q_proj", *QWEN.old])
    config = ours.LoraConfig.from_pretrained(folder) if is_given else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ours.PeftModel.from_pretrained(QWEN.model(), folder, config=config)
    assert not any("keys" in str(warning.message) for warning in caught)
    assert model.peft_config["default"].target_modules == {"q_proj"}
    assert model.peft_config["default"].target_parameters == ["down_proj", "gate.weight", "gate_up_proj"]
    with quiet():
        model.save_pretrained(tmp_path / "new")
        again = ours.PeftModel.from_pretrained(QWEN.model(), tmp_path / "new")
    assert torch.equal(loss_and_logits(again)[1], loss_and_logits(model)[1])
