"""Helpers of `lorakit.peft.utilities` that no other test file covers."""

from __future__ import annotations

import pytest
from torch import nn

from lorakit.peft.utilities import (
    TorchaoBackend,
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
