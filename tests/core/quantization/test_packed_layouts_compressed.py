"""Weights in the layouts of compressed-tensors, compared with their definition and with the package if installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.quantization import weight_format_of
from lorakit.core.quantization.packed import PackedLinear, packed_linear
from lorakit.core.quantization.packed_layouts import CompressedLinear
from lorakit.errors import MergeError, ModelError

from ... import packed_models

ROWS, COLUMNS = 40, 80
EVERY = pytest.mark.parametrize("layout", packed_models.COMPRESSED)


def pair(layout: str) -> tuple[PackedLinear, nn.Linear]:
    """Return a packed layer, and the dense layer with the weight that the layout defines."""
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS)
    parts, linear.weight.data = packed_models.compressed_tensors(ROWS, COLUMNS, layout)
    block = packed_models.BLOCK if layout.endswith("block") else None
    return packed_linear(CompressedLinear, linear, parts, {"block": block}), linear


@EVERY
def test_the_weight_is_read_as_the_format_defines_it(layout: str) -> None:
    module, linear = pair(layout)
    base = weight_format_of(module)
    assert base.quantized
    torch.testing.assert_close(
        base.read(module, base.stored(module, "weight")), linear.weight.detach(), rtol=1e-6, atol=0
    )


@EVERY
def test_outputs_and_gradients_are_those_of_the_dense_model(layout: str) -> None:
    results = []
    for one in map(nn.Sequential, pair(layout)):
        core.attach(one, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), seed=1)
        x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = one.train()(x)
        y.square().mean().backward()
        results.append([y, x.grad, *(parameter.grad for _, parameter in core.trainable_parameters(one))])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@EVERY
def test_the_package_dequantizes_to_the_same_values(layout: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    module, linear = pair(layout)
    weights: dict[str, Any] = packed_models.quantization(layout)["config_groups"]["group_0"]["weights"]
    zeros = module._parameters["weight_zero_point"]
    scale: Any = module.weight_scale
    found = dequantize(
        module.weight.data, scale.data, None if zeros is None else zeros.data, QuantizationArgs(**weights)
    )
    torch.testing.assert_close(found.float(), linear.weight.detach(), rtol=1e-6, atol=0)


def test_merging_is_rejected_in_place_and_exact_in_a_dense_copy() -> None:
    model = nn.Sequential(pair("int8-channel")[0])
    core.attach(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), seed=1)
    x = torch.randn(2, COLUMNS)
    wanted = model(x)
    with pytest.raises(MergeError, match="dense=True"):
        core.merge(model)
    core.merge(model, dense=True)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    core.unmerge(model)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("weight_scale", lambda t: t * float("nan")),
        ("weight_scale", lambda t: None),
        ("weight_scale", lambda t: t[:-1]),
        ("weight", lambda t: t[:, :-1]),
    ],
)
def test_damaged_tensors_are_rejected(field: str, change: Any) -> None:
    model = nn.Sequential(pair("int8-channel")[0])
    value = change(getattr(model[0], field).data)
    model[0]._parameters[field] = None if value is None else nn.Parameter(value, requires_grad=False)
    with pytest.raises(ModelError) as caught:
        core.attach(model, LoraConfig(r=3, target_modules=["0"]))
    assert caught.value.where == "0" and caught.value.field == field and isinstance(model[0], PackedLinear)
