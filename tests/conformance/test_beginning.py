"""New adapters: the same zero factors and dtypes, and the same values under the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit.peft as ours

from .architectures import model_named, outputs_of
from .closeness import assert_close
from .rows import Row, copy_adapters, quiet_peft, randomise, theirs


class Wide(nn.Module):
    """One site of each kind, wide enough for its spread to be measured."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(300, 200)
        self.conv = Conv1D(300, 200)
        self.linear = nn.Linear(300, 150)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(self.embed(ids)))


def _factors(library: Any, **fields: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    with quiet_peft():
        model = library.get_peft_model(Wide(), library.LoraConfig(r=16, **fields))
    return {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize(
    ("init", "fields"),
    [
        (True, {}),
        (False, {}),
        ("gaussian", {}),
        (True, {"use_rslora": True, "use_dora": True}),
        (True, {"lora_bias": True}),
        (False, {"lora_bias": True}),
    ],
    ids=str,
)
def test_same_values_under_the_same_seed(init: bool | str, fields: dict[str, bool]) -> None:
    targets = ["conv", "linear"] if "lora_bias" in fields else ["embed", "conv", "linear"]
    expected = _factors(theirs, target_modules=targets, init_lora_weights=init, **fields)
    found = _factors(ours, target_modules=targets, init_lora_weights=init, **fields)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if "magnitude" not in name:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("init", [True, False, "gaussian"], ids=str)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=lambda kind: kind.__name__)
def test_convolutions_have_the_same_values_under_the_same_seed(kind: type[nn.Module], init: bool | str) -> None:
    made = []
    for library in (theirs, ours):
        torch.manual_seed(3)
        config = library.LoraConfig(r=4, target_modules=["0"], init_lora_weights=init)
        with quiet_peft():
            layer = library.get_peft_model(nn.Sequential(kind(8, 12, 3, groups=2)), config).base_model.model[0]
        made.append((layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_dora_begins_at_the_norm_of_the_weight() -> None:
    expected = _factors(theirs, target_modules=["conv", "linear"], use_dora=True)
    found = _factors(ours, target_modules=["conv", "linear"], use_dora=True)
    vectors = {name: tensor for name, tensor in expected.items() if "magnitude" in name}
    assert len(vectors) == 2
    assert_close({name: found[name] for name in vectors}, vectors)


LOW = Row("low", "llama-words", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj", "embed_tokens"]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_factors_beside_a_base_of_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    made = []
    for library in (theirs, ours):
        with quiet_peft():
            made.append(library.get_peft_model(model_named(LOW.model).to(dtype), LOW.config(library)).eval())
    peft_model, our_model = made
    randomise(peft_model)
    copy_adapters(peft_model, our_model)
    assert {n: p.dtype for n, p in our_model.named_parameters()} == {
        n: p.dtype for n, p in peft_model.named_parameters()
    }
    with quiet_peft():
        peft_model.save_pretrained(tmp_path / "peft")
    our_model.save_pretrained(tmp_path / "ours")
    first, second = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("peft", "ours"))
    assert {n: t.dtype for n, t in second.items()} == {n: first[n].dtype for n in second}
    with torch.no_grad():
        expected, found = (outputs_of(model(**LOW.inputs)) for model in (peft_model, our_model))
    rounding = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-6}[
        dtype
    ]  # ours computes in the base's dtype
    assert_close(found, expected, rtol=rounding)
