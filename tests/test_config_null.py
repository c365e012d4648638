"""Null in fields of `LoraConfig` whose type does not include it: the result is that of peft, or an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft as real
import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig, PeftConfig, read_config
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.peft import PeftModel, get_peft_model

REJECTED = {"bias": "one of", "lora_dropout": "a finite number", "lora_alpha": "a finite number"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))


def with_null(folder: Path, field: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: None}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = real.get_peft_model(network(), real.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("field", REJECTED)
def test_a_null_that_peft_cannot_use_is_an_error_that_names_the_field(field: str, saved: Path) -> None:
    given: dict[str, Any] = {"r": 2, "target_modules": ["1"], field: None}
    with pytest.raises((AttributeError, TypeError)):
        real.get_peft_model(network(), real.LoraConfig(**given))
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**given)
    assert (caught.value.field, caught.value.what) == (field, None) and REJECTED[field] in str(caught.value)
    with_null(saved, field)
    for load in (read_config, lambda folder: core.load_adapter(network(), folder)):
        with pytest.raises(AdapterFileError) as of_file:
            load(saved)
        assert of_file.value.field == field and str(saved) in str(of_file.value.where)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(network(), saved)
    with pytest.raises(ConfigError):
        PeftConfig.from_pretrained(saved)


def test_a_null_init_is_random_as_in_peft(saved: Path) -> None:
    def effect(peft: Any, init: bool | None) -> torch.Tensor:
        model = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights=init))
        found: torch.Tensor = model(torch.arange(5)) - network()(torch.arange(5))
        return found.detach()

    import lorakit.peft as ours

    for peft in (real, ours):
        assert effect(peft, None).abs().max() > 0 and effect(peft, True).abs().max() == 0
    assert LoraConfig(init_lora_weights=None).init_lora_weights is False
    with_null(saved, "init_lora_weights")
    assert read_config(saved)[0].init_lora_weights is False
    wanted = real.PeftModel.from_pretrained(network(), saved)(torch.arange(5))
    torch.testing.assert_close(PeftModel.from_pretrained(network(), saved)(torch.arange(5)), wanted)
    get_peft_model(network(), LoraConfig(r=2, target_modules=["1"], init_lora_weights=None)).save_pretrained(saved)
    assert real.PeftConfig.from_pretrained(saved).init_lora_weights is False
