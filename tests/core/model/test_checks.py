"""Modules that their model does not call cannot be adapted; checks raise before anything changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import LoraConfig
from lorakit.core import activate, attach, detach, load_adapter, save_adapter
from lorakit.core.model.checks import ALLOWANCES
from lorakit.errors import AdapterError, ConfigError, RouteError, TargetError


class Mixer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=kind)
        self.in_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out_proj(self.in_proj(x))
        return found


@pytest.mark.parametrize("kind", ["mamba", "nemotron_h"])
@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"], ids=str)
def test_what_a_fused_kernel_reads_past_is_refused(kind: str, targets: Any, tmp_path: Path) -> None:
    model = Mixer(kind)
    with pytest.raises(TargetError, match="incompatible with Mamba-based models") as caught:
        attach(model, LoraConfig(r=2, target_modules=targets))
    assert (caught.value.what, caught.value.field) == ("out_proj", "target_modules")
    assert type(model.out_proj) is nn.Linear
    attach(model, LoraConfig(r=2, target_modules=["in_proj"]))
    other = Mixer("llama")
    attach(other, LoraConfig(r=2, target_modules=targets))
    save_adapter(other, tmp_path)
    with pytest.raises(TargetError, match="incompatible with Mamba-based models"):
        load_adapter(model, tmp_path, "loaded", allow=["base_mismatch"])
    assert type(model.out_proj) is nn.Linear


def test_fields_say_which_adapter_and_which_allowance() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, LoraConfig(r=2, target_modules=["0"]), "one")
    for call in (activate, detach):
        with pytest.raises((AdapterError, RouteError)) as unknown:
            call(model, "two")
        assert (unknown.value.what, unknown.value.allowed) == ("two", ("one",))
    with pytest.raises(AdapterError) as taken:
        attach(model, LoraConfig(r=2, target_modules=["0"]), "one")
    assert taken.value.what == "one"
    with pytest.raises(ConfigError) as word:
        attach(model, LoraConfig(r=2, target_modules=["0"]), "two", allow=["nonsense"])
    assert (word.value.what, word.value.field, word.value.allowed) == ("nonsense", "allow", ALLOWANCES)
    with pytest.raises(ConfigError, match="allow 'odd_scale'") as scale:
        attach(model, LoraConfig(r=2, lora_alpha=-1, target_modules=["0"]), "two")
    assert (scale.value.where, scale.value.override) == ("0", "odd_scale")
    assert "give --x" in scale.value.text("give --x") and "allow '" not in scale.value.text("give --x")
