"""The module and the weight format for int8 matmuls."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.quantization import weight_format_of
from lorakit.core.quantization.int8_linear import INT8, Int8Linear, int8_matmul_linear
from lorakit.ops.int8 import int8_linear
from lorakit.ops.int8_weight import dequantize, input_scales

OUT, IN = 48, 64


def pair(dtype: torch.dtype = torch.float32, bias: bool = True, kept: int = 4) -> tuple[Int8Linear, nn.Linear]:
    """Return an int8 layer, and the dense layer from which it was made."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    gain, channels = input_scales(torch.rand(IN) + 0.1, [linear.weight], kept)
    return int8_matmul_linear(linear, gain, channels), linear


def tensors(module: Int8Linear) -> list[Tensor]:
    return [module.q, module.scale, module.gain, module.kept, module.columns]


def given() -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kept", [0, 4, IN])
def test_the_weight_is_read_as_the_arithmetic_defines_it(kept: int) -> None:
    module, linear = pair(kept=kept)
    assert weight_format_of(module) is INT8
    stored = INT8.stored(module, "weight")
    read = INT8.read(module, stored)
    assert torch.equal(read, dequantize(module.int8))
    values, bounds = INT8.values(stored, torch.arange(OUT * IN))
    assert torch.equal(values, read.reshape(-1))
    assert bool(((values - linear.weight.reshape(-1)).abs() <= bounds).all())
    assert int((bounds == 0).sum()) == OUT * kept
    assert bool((bounds.reshape(OUT, IN) <= 1.01 * module.scale[:, None] * module.gain / 2).all())


def test_the_forward_and_its_gradient_are_those_of_the_operation() -> None:
    module, _ = pair()
    x = given().requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    wanted = int8_linear(x, module.int8, module.bias)
    assert torch.equal(y, wanted)
    assert torch.equal(gradient, torch.autograd.grad(wanted.square().sum(), x)[0])


def test_autocast_gives_the_output_its_dtype_and_rounds_nothing_else() -> None:
    module, _ = pair()
    x = given()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.bfloat16()))


def test_written_weights_keep_the_input_scales_and_the_kept_channels() -> None:
    module, linear = pair()
    like = INT8.stored(module, "weight")
    wanted = linear.weight + 0.1 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    made = INT8.write(module, like, wanted)
    assert made.parts[2] is module.gain and made.parts[3] is module.kept
    clone = INT8.clone(module, "weight", made)
    _, bounds = INT8.values(made, torch.arange(OUT * IN))
    assert bool(((INT8.read(clone, made) - wanted).abs() <= bounds.reshape(OUT, IN)).all())
    assert torch.equal(INT8.read(module, INT8.stored(module, "weight")), dequantize(module.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_plain_module_has_the_original_dtype(dtype: torch.dtype) -> None:
    module, linear = pair(dtype)
    read = INT8.read(module, INT8.stored(module, "weight"))
    plain: Any = INT8.dense(module, read, torch.float64)
    assert type(plain) is nn.Linear and plain.weight.dtype == dtype
    assert torch.equal(plain.bias, linear.bias)
    assert torch.equal(plain.weight[:, module.kept], linear.weight[:, module.kept])


def test_a_conversion_keeps_the_integers_and_the_scales() -> None:
    module, _ = pair()
    before = [tensor.clone() for tensor in tensors(module)]
    module.to(torch.bfloat16)
    assert [t.dtype for t in tensors(module)] == [torch.int8, torch.float32, torch.float32, torch.int64, torch.bfloat16]
    assert module.bias is not None and module.bias.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before[:4], tensors(module)[:4], strict=True))
    assert module(given().bfloat16()).dtype == torch.bfloat16


def test_meta_and_back() -> None:
    module, _ = pair()
    meta = copy.deepcopy(module).to("meta")
    assert all(tensor.is_meta for tensor in tensors(meta)) and meta.scale.dtype == torch.float32
    again = meta.to_empty(device="cpu")
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(given()), module(given()))


def test_state_dict_deepcopy_and_pickle() -> None:
    module, _ = pair()
    assert set(module.state_dict()) == {"q", "scale", "gain", "kept", "columns", "bias"}
    other, _ = pair()
    with torch.no_grad():
        other.q.zero_()
    other.load_state_dict(module.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (other, copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(copied(given()), module(given()))
        assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_layers_with_one_input_share_its_scales_after_a_copy_too() -> None:
    first, linear = pair()
    second = int8_matmul_linear(linear, first.gain, first.kept)
    assert second.gain is first.gain and second.kept is first.kept
    copied: Any = copy.deepcopy(nn.ModuleList([first, second]))
    assert copied[0].gain is copied[1].gain


def test_repr_and_mode() -> None:
    module, linear = pair()
    assert repr(module) == f"Int8Linear(in_features={IN}, out_features={OUT}, bias=True)"
    assert not int8_matmul_linear(linear.eval(), module.gain, module.kept).training


def test_a_conv1d_comes_back() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(OUT, IN).requires_grad_(False)
    gain, kept = input_scales(torch.ones(IN), [conv.weight.t()], 4)
    module = int8_matmul_linear(conv, gain, kept)
    assert (module.out_features, module.in_features) == (OUT, IN)
    assert (module(given()) - conv(given())).norm() < 0.02 * conv(given()).norm()
    plain: Any = INT8.dense(module, INT8.read(module, INT8.stored(module, "weight")), torch.float32)
    assert type(plain) is Conv1D and plain.weight.shape == (IN, OUT)
    assert (plain(given()) - conv(given())).norm() < 0.02 * conv(given()).norm()
