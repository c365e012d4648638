"""Whichever way an adapter is loaded, another base than its own is a warning, and its own base is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core import inspect_adapter
from lorakit.peft import LoraConfig, PeftModel, get_peft_model
from lorakit.peft.utils.hotswap import hotswap_adapter

from .models import randomise


def base(factor: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    with torch.no_grad():
        model[1].weight.mul_(factor)
    return model


def config() -> Any:
    return LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)


def with_config(model: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(model, folder, config=config())


def plain(model: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(model, folder)


def onto_one_that_is_there(model: nn.Module, folder: Path) -> None:
    get_peft_model(model, config()).load_adapter(folder, "default")


def swapped(model: nn.Module, folder: Path) -> None:
    hotswap_adapter(get_peft_model(model, config()), str(folder), "default")


@pytest.mark.parametrize("load", [plain, with_config, onto_one_that_is_there, swapped])
def test_another_base_is_a_warning(load: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    theirs = get_peft_model(base(), config())
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).base is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(base(), tmp_path)
    with pytest.warns(UserWarning, match=r"another base.*1\.weight"):
        load(base(1.01), tmp_path)
