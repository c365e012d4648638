"""Quantized weights, decoded by our formulas and compared with the values that the packages dequantize."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from tests.quantized_layers import quantized_linear
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.model.base_view import dequantize, quantized_weights, wrong_dequantization
from lorakit.core.quantization import allow_repacking, disable_repacking, weight_format_of
from lorakit.errors import MergeError
from lorakit.plan.quantized import STORAGES, Quantization

WAYS = [
    pytest.param(
        Quantization(storage.name, double),
        id=f"{storage.name}{'-double' if double else ''}",
        marks=pytest.mark.skipif(importlib.util.find_spec(storage.package) is None, reason="not installed"),
    )
    for storage in STORAGES
    for double in ((False, True) if storage.doubles else (False,))
]
PUBLISHED = {
    "bitsandbytes 4-bit": lambda m: __import__("bitsandbytes").functional.dequantize_4bit(
        m.weight, m.weight.quant_state
    ),
    "bitsandbytes 8-bit": lambda m: __import__("bitsandbytes").functional.int8_vectorwise_dequant(
        m.weight.data, m.state.SCB
    ),
    "torchao": lambda m: m.weight.dequantize(),
    "HQQ": lambda m: m.dequantize(),
}


def linear(rows: int = 64, columns: int = 192, bias: bool = True, heavy: bool = False) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        made.weight.copy_(torch.randn(rows, columns, generator=generator) * 0.1)
        if heavy:
            made.weight[:, ::17].mul_(20)
    return made.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
def test_our_formula_is_the_published_one(way: Quantization, heavy: bool) -> None:
    plain = linear(heavy=heavy)
    before = plain.weight.detach().clone()
    module = quantized_linear(plain, way)
    row = weight_format_of(module)
    stored = row.stored(module, "weight")
    W = row.read(module, stored)
    assert W.shape == (64, 192) and W.dtype == torch.float32 and row.quantized
    published = PUBLISHED[row.name](module)
    assert torch.allclose(W, published, atol=1e-6)
    targets = torch.arange(W.numel())
    numbers, bounds = row.values(stored, targets)
    assert torch.allclose(numbers.reshape(W.shape), published, atol=1e-6)
    assert ((numbers - before.reshape(-1)).abs() <= bounds).all()
    some = torch.tensor([5, 64, 64 * 192 - 1, 191])
    assert torch.equal(row.values(stored, some)[0], numbers[some])
    assert wrong_dequantization(nn.Sequential(module)) is None


@pytest.mark.parametrize("way", WAYS)
def test_a_written_weight_is_on_the_clone_and_not_on_the_module(way: Quantization) -> None:
    module = quantized_linear(linear(), way)
    row, x = weight_format_of(module), torch.randn(3, 192)
    stored = row.stored(module, "weight")
    W = row.read(module, stored)
    with torch.no_grad():
        before = module(x)
        wanted = W + 0.05 * torch.randn(W.shape)
        written = row.write(module, stored, wanted)
        clone = row.clone(module, "weight", written)
        after = clone(x)
    assert torch.equal(row.read(module, row.stored(module, "weight")), W)
    with torch.no_grad():
        assert torch.equal(module(x), before)
    error = (row.read(clone, written) - wanted).norm() / wanted.norm()
    assert 0 < error < (0.15 if way.storage.bits == 4 else 0.01)
    bias: Any = module.bias
    assert torch.allclose(after, x @ row.read(clone, written).T + bias, atol=6e-2 if way.name == "int8" else 1e-5)
    row.put_stored(module, "weight", written)
    with torch.no_grad():
        assert torch.equal(module(x), after)
    row.put_stored(module, "weight", stored)
    with torch.no_grad():
        assert torch.equal(module(x), before)


@pytest.mark.parametrize("way", WAYS)
def test_the_plain_module_computes_the_same(way: Quantization) -> None:
    model = nn.Sequential(quantized_linear(linear(), way), nn.Tanh(), linear(7, 64)).eval()
    x = torch.randn(3, 192)
    with torch.no_grad():
        before = model(x)
        assert dequantize(model) == 1
        assert type(model[0]) is nn.Linear and not list(quantized_weights(model))
        assert torch.allclose(model(x), before, atol=6e-2 if way.name == "int8" else 1e-5)


def four_bit(columns: int = 128, rows: int = 64, **options: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(columns, rows, quant_type="nf4", **options)
    made.load_state_dict(linear(rows, columns).state_dict())
    return made.to("cpu").eval()


def repacks(module: Any) -> bool:
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


def test_held_still_no_mode_changes_a_bit_and_gradients_pass() -> None:
    module, x = four_bit(), torch.randn(3, 128, requires_grad=True)
    flag = repacks(module)
    held = disable_repacking(nn.Sequential(module))
    bits = module.weight.data.clone()
    with torch.no_grad():
        module(x)
    assert torch.equal(module.weight.data, bits) and module.weight.quant_state.nested
    (gradient,) = torch.autograd.grad(module.train()(x).sum(), x)
    assert torch.allclose(
        gradient, weight_format_of(module).read(module, module.weight).sum(0).expand_as(gradient), atol=1e-4
    )
    allow_repacking(held)
    assert repacks(module) == flag and len(held) == int(flag)


def test_what_was_repacked_for_a_cpu_is_read_and_plain_again() -> None:
    module, x = four_bit(), torch.randn(3, 128)
    if not repacks(module):
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes does not repack")
    row = weight_format_of(module)
    plain = row.read(module, module.weight)
    with torch.no_grad():
        module(x)
    assert module.weight.quant_state.packing_format_for_cpu
    repacked = row.read(module, module.weight)
    assert torch.allclose(repacked, plain, rtol=2**-7, atol=1e-6)  # its scales were rounded to bf16
    numbers, _ = row.values(module.weight, torch.arange(plain.numel()))
    assert torch.equal(numbers.reshape(plain.shape), repacked)
    model = nn.Sequential(module)
    core.attach(model, LoraConfig(r=2, target_modules=["0"]))
    assert not module.weight.quant_state.packing_format_for_cpu
    assert torch.equal(row.read(module, module.weight), repacked)
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for _, parameter in core.trainable_parameters(model))
    core.detach(model)
    assert repacks(module)


def test_a_width_that_the_package_gets_wrong_is_found() -> None:
    module = four_bit(columns=96, compress_statistics=False)
    disable_repacking(nn.Sequential(module))
    with torch.no_grad():
        module.weight.quant_state.absmax.mul_(torch.linspace(0.1, 3, module.weight.quant_state.absmax.numel()))
    found = wrong_dequantization(nn.Sequential(module))
    assert found is None or (found[0] == "0.weight" and found[1] > 0.05)  # None: a release that fixed it


def test_a_weight_on_the_meta_device_has_a_place() -> None:
    pytest.importorskip("bitsandbytes")
    module = quantized_linear(linear(), Quantization("nf4"))
    assert weight_format_of(module).device(module, "weight") == torch.device("cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_that_is_not_quantized_yet_can_be_adapted_and_fingerprinted(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    module = bnb.nn.Linear4bit(64, 64) if bits == 4 else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    model = nn.Sequential(module)
    core.attach(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert torch.equal(model[0].read(), module.weight.detach().float())
    assert core.fingerprint(model).samples
    with pytest.raises(MergeError, match="has not been quantized yet"):
        core.merge(model)
