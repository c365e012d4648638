"""The same quantized base under both libraries: the same outputs and gradients, and files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit.peft as ours
from lorakit import hub

from .rows import quiet_peft, theirs

IDS = torch.tensor([[5, 17, 200, 3, 9, 44], [7, 7, 31, 2, 90, 12]])
STORAGES = ("nf4", "int8", "int8-torchao", "hqq4")
WITH_DORA = ("nf4", "hqq4")
"""Where peft has DoRA and its forward is the same in both modes."""


def base(folder: Path, quantization: str) -> Any:
    pytest.importorskip({"nf4": "bitsandbytes", "int8": "bitsandbytes", "hqq4": "hqq"}.get(quantization, "torchao"))
    with quiet_peft():
        return hub.load_model(folder, "float32", quantization=quantization)


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("quantization", STORAGES)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_the_same_outputs_gradients_and_files(
    quantization: str, dora: bool, wide_model_directory: Path, tmp_path: Path
) -> None:
    if dora and quantization not in WITH_DORA:
        pytest.skip("peft's forward rounds, or has no DoRA, there")
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": dora}
    with quiet_peft():
        them = randomised(theirs.get_peft_model(base(wide_model_directory, quantization), theirs.LoraConfig(**fields)))
        them.save_pretrained(tmp_path / "peft")
    us = ours.PeftModel.from_pretrained(base(wide_model_directory, quantization), tmp_path / "peft", is_trainable=True)
    them.train()
    us.train()
    expected, found = logits(them), logits(us)
    near(found, expected)
    for model, out in ((them, expected), (us, found)):
        model.zero_grad()
        out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in them.named_parameters() if parameter.grad is not None}
    own = {name: parameter.grad for name, parameter in us.named_parameters() if parameter.grad is not None}
    assert set(own) == set(gradients)
    for name, gradient in gradients.items():
        near(own[name], gradient, 1e-4)
    us.save_pretrained(tmp_path / "lorakit")
    with quiet_peft():
        again = theirs.PeftModel.from_pretrained(base(wide_model_directory, quantization), tmp_path / "lorakit")
        near(logits(again.train()), expected)


@pytest.mark.parametrize("quantization", STORAGES)
def test_an_adapter_of_the_quantized_base_loads_on_the_plain_one_in_both(
    quantization: str, wide_model_directory: Path, tmp_path: Path
) -> None:
    config = ours.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    us = randomised(ours.get_peft_model(base(wide_model_directory, quantization), config))
    us.save_pretrained(tmp_path)
    mine = ours.PeftModel.from_pretrained(hub.load_model(wide_model_directory, "float32"), tmp_path)
    with quiet_peft():
        other = theirs.PeftModel.from_pretrained(hub.load_model(wide_model_directory, "float32"), tmp_path)
        near(logits(mine), logits(other))


@pytest.mark.filterwarnings("ignore:Adapter 'default' applies to a base")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("rslora", [False, True])
def test_olora_rounds_the_same_base_to_the_same_numbers(
    quantization: str, rslora: bool, wide_model_directory: Path
) -> None:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": rslora}
    made = []
    for library in (theirs, ours):
        with quiet_peft():
            config = library.LoraConfig(init_lora_weights="olora", **fields)
            made.append(library.get_peft_model(base(wide_model_directory, quantization), config))
    them, us = made
    for name, tensor in them.state_dict().items():
        if "lora_" in name:
            torch.testing.assert_close(us.state_dict()[name].abs(), tensor.abs(), atol=1e-4, rtol=1e-3)
    near(logits(us.train()), logits(them.train()), 2e-3)  # a number at the edge of two steps may fall to either


@pytest.mark.parametrize("quantization", STORAGES)
@pytest.mark.parametrize("init", ["pissa", "corda", "loftq", "lora_ga"])
def test_what_peft_refuses_on_a_quantized_base_is_refused(
    quantization: str, init: str, wide_model_directory: Path
) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    if init == "loftq":
        fields["loftq_config"] = {"loftq_bits": 4}
    if init in ("corda", "lora_ga"):
        fields |= {f"{init}_config": (ours.CordaConfig if init == "corda" else ours.LoraGAConfig)()}
    model = base(wide_model_directory, quantization)
    before = logits(model)
    with pytest.raises(ValueError, match=r"have to be requantized|please run `preprocess_"):
        ours.get_peft_model(model, ours.LoraConfig(**fields))
    assert torch.equal(logits(model), before)
