"""Helpers of `lorakit.peft.utilities` that no other test file covers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from lorakit.peft import LoraConfig, get_peft_model
from lorakit.peft.utilities import (
    TorchaoBackend,
    fsdp_auto_wrap_policy,
    init_empty_weights,
    resolve_quantization_backend,
    skip_init_on_device,
)

from ..laws.quantized import specimen, storages


@pytest.mark.parametrize("storage", [one for one in storages() if one.values[0].package == "torchao"])
def test_the_backend_of_torchao(storage: object) -> None:
    found = [resolve_quantization_backend(module) for module in specimen(storage).model().modules()]
    assert any(isinstance(backend, TorchaoBackend) for backend in found)
    assert resolve_quantization_backend(nn.Linear(2, 2)) is None


def test_a_function_can_be_exempted_from_the_meta_device() -> None:
    exempt = skip_init_on_device(lambda: nn.Linear(2, 2))
    with init_empty_weights():
        devices = [layer.weight.device.type for layer in (exempt(), nn.Linear(2, 2), exempt())]
    assert devices == ["cpu", "meta", "cpu"]
    assert exempt().weight.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_the_fsdp_policy_wraps_what_pefts_wraps(tiny_llama: Any) -> None:
    peft = pytest.importorskip("peft")
    from peft.utils.other import fsdp_auto_wrap_policy as theirs

    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True}

    def wrapped(model: Any, policy: Any) -> set[str]:
        chosen = policy(model)
        named = model.named_modules()
        return {path for path, module in named if chosen(module=module, recurse=False, nonwrapped_numel=0)}

    other = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.LoraConfig(**options))
    own = wrapped(get_peft_model(tiny_llama, LoraConfig(**options)), fsdp_auto_wrap_policy)
    assert own == wrapped(other, theirs)
    assert any(path.endswith("lora_A.default") for path in own)
