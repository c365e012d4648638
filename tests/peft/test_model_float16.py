"""PEFT's API on a base in fp16: factors in fp32, training with torch's GradScaler, and saved files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.peft import LoraConfig, PeftModel, get_peft_model

IDS = torch.tensor([[5, 17, 20, 3, 9, 44, 8, 2]])


def trained(base: Any, scaler: torch.amp.GradScaler | None) -> tuple[Any, list[float]]:
    """Wrap a base, and return it with the losses of four steps."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
    return model, losses


def test_training_on_an_fp16_base(tiny_llama: Any, tmp_path: Path) -> None:
    half = copy.deepcopy(tiny_llama).half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, losses = trained(half, scaler)
    _, wanted = trained(copy.deepcopy(tiny_llama), None)
    assert losses == pytest.approx(wanted, rel=2e-2) and losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = PeftModel.from_pretrained(copy.deepcopy(tiny_llama).half(), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
