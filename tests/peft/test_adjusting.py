"""Contexts that change the effect of adapters, and the signatures of a wrapper."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import AdapterError, ConfigError
from lorakit.peft import LoraConfig, PeftModel, get_peft_model
from lorakit.peft.helpers import (
    DoraCaching,
    check_if_peft_model,
    disable_input_dtype_casting,
    find_kappa_target_modules,
    rescale_adapter_scale,
    update_signature,
)

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def model() -> Any:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    return get_peft_model(plain, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()


def test_an_adapter_acts_so_many_times_as_strongly_in_the_block() -> None:
    wrapped = model()
    full = wrapped(X)
    with wrapped.disable_adapter():
        base = wrapped(X)
    with rescale_adapter_scale(wrapped, 0.5):
        torch.testing.assert_close(wrapped(X), (full + base) / 2)
    with pytest.raises(ZeroDivisionError), rescale_adapter_scale(wrapped, 2):
        raise ZeroDivisionError
    assert torch.equal(wrapped(X), full)
    with pytest.raises(TypeError, match="multiplier should be of type float"), rescale_adapter_scale(wrapped, "2"):
        pass
    with pytest.raises(AdapterError, match="only supported for models with"), rescale_adapter_scale(nn.ReLU(), 2):
        pass


def test_a_block_of_pefts_that_has_nothing_to_do_here() -> None:
    wrapped = model()
    full = wrapped(X)
    caching = DoraCaching()
    caching(enabled=True)
    with caching:
        assert torch.equal(wrapped(X), full)


def test_hooks_that_cast_a_need_inputs_that_are_not_cast() -> None:
    wrapped = model().half()
    layer = wrapped.base_model.model[0]

    def to(dtype: torch.dtype, module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)

    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], wrapped.base_model.model[1]):
        module.register_forward_pre_hook(lambda module, _: to(torch.float32, module))
        module.register_forward_hook(lambda module, *_: to(torch.float16, module))
    for _ in range(2):  # the block leaves no trace
        with disable_input_dtype_casting(wrapped):
            assert wrapped(X).dtype == torch.float32
        with pytest.raises(RuntimeError, match="dtype"), disable_input_dtype_casting(wrapped, active=False):
            wrapped(X)
        for module in wrapped.modules():
            to(torch.float16, module)


def test_a_folder_with_an_adapter(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "a")
    assert check_if_peft_model(tmp_path / "a") and not check_if_peft_model(tmp_path)


def test_a_wrapper_shows_the_signature_inside() -> None:
    wrapped = model()
    assert "input" not in inspect.signature(wrapped.forward).parameters
    full = wrapped(X)
    update_signature(wrapped)
    assert wrapped.forward.__annotations__ == nn.Sequential.forward.__annotations__ and torch.equal(wrapped(X), full)
    with pytest.raises(ConfigError, match="method nothing is not supported"):
        update_signature(wrapped, "nothing")
    assert isinstance(wrapped, PeftModel)


def test_the_best_conditioned_modules() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for number, layer in enumerate(plain):
            layer.weight.copy_(torch.diag(torch.tensor([1.0 + 2 * number, 1, 1, 1])))
    assert find_kappa_target_modules(plain, top_p=0.7) == {"target_modules": ["0", "1"], "target_parameters": None}
