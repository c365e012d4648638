"""fp8 weights with block scales: decoding, gradients, merging, and the class `FP8Linear` of transformers."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.model.base_view import dequantize, quantized_weights, wrong_dequantization
from lorakit.core.quantization import weight_format_of
from lorakit.core.quantization.fp8 import Fp8Linear
from lorakit.errors import ConfigError, ModelError

from ... import packed_models

ROWS, COLUMNS = 40, 72
BLOCKS = [(128, 128), (16, 32), (1, 8), None]
TARGETS = ["up", "square"]


def reference(values: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Return the weight as the format defines it."""
    values, scales = values.detach().double(), scales.detach().double()
    if block is None:
        return (values * scales).float()
    rows, columns = torch.arange(values.shape[0]).unsqueeze(1), torch.arange(values.shape[1])
    return (values * scales[rows // block[0], columns // block[1]]).float()


def fp8_of_transformers(linear: nn.Linear, block: tuple[int, int] | None, scale_fmt: str = "float") -> Any:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    rows, columns = linear.weight.shape
    made = integration.FP8Linear(columns, rows, block, scale_fmt=scale_fmt, has_bias=linear.bias is not None)
    scales = made.weight_scale_inv
    with torch.no_grad():
        scales.copy_(torch.exp2(torch.randint(-3, 3, scales.shape).float()))
        made.weight.copy_((linear.weight / 4).to(torch.float8_e4m3fn))
        if linear.bias is not None:
            made.bias.copy_(linear.bias)
    return made


def pair(block: tuple[int, int] | None, foreign: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a model with fp8 layers, and the dense model with the dequantized weights."""
    torch.manual_seed(0)
    plain = nn.Sequential()
    plain.add_module("up", nn.Linear(COLUMNS, ROWS))
    plain.add_module("act", nn.Tanh())
    plain.add_module("square", nn.Linear(ROWS, ROWS, bias=False))
    model, dense = copy.deepcopy(plain), copy.deepcopy(plain)
    for name in TARGETS:
        linear: Any = getattr(plain, name)
        packed = fp8_of_transformers(linear, block) if foreign else packed_models.fp8_linear(linear, block)
        setattr(model, name, packed)
        getattr(dense, name).weight.data = reference(packed.weight, packed.weight_scale_inv, block)
    return model, dense


def adapted(model: nn.Module, **words: Any) -> list[tuple[str, nn.Parameter]]:
    core.attach(model, LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, **words), seed=1)
    return list(core.trainable_parameters(model))


@pytest.mark.parametrize("foreign", [True, False], ids=["transformers", "own"])
@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_and_gradients_are_those_of_the_dense_model(block: tuple[int, int] | None, foreign: bool) -> None:
    model, dense = pair(block, foreign)
    results = []
    for one in (model, dense):
        parameters = adapted(one)
        x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = one.train()(x)
        y.square().mean().backward()
        results.append([y, x.grad, *(parameter.grad for _, parameter in parameters)])
    assert len(results[0]) == 6
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_variants_read_the_weight(words: dict[str, Any]) -> None:
    outputs = []
    for one in pair((16, 32)):
        adapted(one, **words)
        outputs.append(one(torch.ones(2, COLUMNS)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(16, 32), (128, 128)])
def test_the_weight_is_read_as_the_format_defines_it(block: tuple[int, int], scale_fmt: str) -> None:
    module = fp8_of_transformers(nn.Linear(COLUMNS, ROWS), block, scale_fmt)
    base = weight_format_of(module)
    stored = base.stored(module, "weight")
    wanted = reference(module.weight, module.weight_scale_inv.float(), block)
    assert base.quantized and torch.equal(base.read(module, stored), wanted)
    some = torch.tensor([0, 71, 72, ROWS * COLUMNS - 1])
    assert torch.equal(base.values(stored, some)[0], wanted.reshape(-1)[some])
    assert wrong_dequantization(nn.Sequential(module)) is None


@pytest.mark.parametrize("block", BLOCKS)
def test_errors_are_within_their_bounds(block: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS)
    linear.weight.data *= torch.logspace(-4, 2, COLUMNS)
    module = packed_models.fp8_linear(linear, block)
    base = weight_format_of(module)
    values, bounds = base.values(base.stored(module, "weight"), torch.arange(ROWS * COLUMNS))
    assert ((values - linear.weight.detach().reshape(-1)).abs() <= bounds * (1 + 1e-6)).all()


def test_the_class_of_a_module_is_restored_and_copies_keep_working() -> None:
    model, dense = pair((16, 32))
    x, before = torch.randn(2, COLUMNS), type(model.up)
    adapted(model)
    assert type(model.up.base_layer) is Fp8Linear
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)
    core.detach(model)
    assert type(model.up) is type(model.square) is before
    assert not {name for name in vars(model.up) if "kernel" in name}
    adapted(dense)
    torch.testing.assert_close(dense(x), wanted)


def test_half_precision_and_autocast_pass_gradients() -> None:
    model, _ = pair((16, 32), foreign=False)
    adapted(model)
    x = torch.randn(2, COLUMNS, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    assert x.grad.abs().sum() > 0


def test_an_adapter_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = pair((16, 32))
    x = torch.randn(4, COLUMNS)
    found = packed_models.losses(model, [parameter for _, parameter in adapted(model)], x)
    assert found[-1] < found[0]
    core.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(x)
    again, dense = pair((16, 32))
    core.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), wanted)
    core.load_adapter(dense, tmp_path / "adapter")  # the fingerprint is that of the dense base
    torch.testing.assert_close(dense(x), wanted)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_merge_reports_its_error_and_is_undone_exactly(block: tuple[int, int] | None) -> None:
    model, _ = pair(block, foreign=False)
    adapted(model)
    x = torch.randn(2, COLUMNS)
    wanted = model(x)
    before = [part.detach().clone() for w in quantized_weights(model) for part in w.base.tensors(w.stored)]
    state = {name: tensor.clone() for name, tensor in core.merged_state_dict(model).items()}
    report = core.merge(model)
    assert all(0 < site.error < 0.05 for site in report.sites)
    assert (model(x) - wanted).norm() < 0.1 * wanted.norm()
    assert core.fingerprint(model) == core.fingerprint(pair(block, foreign=False)[0])
    core.unmerge(model)
    after = [part for w in quantized_weights(model) for part in w.base.tensors(w.stored)]
    assert all(map(torch.equal, before, after)) and torch.equal(model(x), wanted)
    plain = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Tanh(), nn.Linear(ROWS, ROWS, bias=False))
    plain.load_state_dict({name.replace("up", "0").replace("square", "2"): t for name, t in state.items()})
    torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_dense_merge_is_exact() -> None:
    model, _ = pair((16, 32))
    adapted(model)
    x = torch.randn(2, COLUMNS)
    wanted = model(x)
    core.merge(model, dense=True)
    assert type(model.up.base_layer) is nn.Linear
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    core.unmerge(model)
    assert torch.equal(model(x), wanted)


def test_a_dense_copy_computes_the_same() -> None:
    model, dense = pair((16, 32))
    assert dequantize(model) == 2 and type(model.up) is nn.Linear
    x = torch.randn(2, COLUMNS)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_rejected(value: float) -> None:
    model, _ = pair((16, 32))
    model.square.weight_scale_inv.data[0, 0] = value
    types = [type(module) for module in model]
    with pytest.raises(ModelError) as caught:
        adapted(model)
    assert caught.value.where == "square" and caught.value.field == "weight_scale_inv"
    assert [type(module) for module in model] == types


def test_missing_scales_are_rejected() -> None:
    model, _ = pair((16, 32))
    model.up.weight_scale_inv = None
    with pytest.raises(ModelError) as caught:
        adapted(model)
    assert caught.value.where == "up" and caught.value.what == "weight_scale_inv"


def test_inits_that_would_round_the_base_again_are_rejected() -> None:
    model, _ = pair((16, 32))
    with pytest.raises(ConfigError, match=r"quantized|fp8"):
        core.attach(model, LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="pissa"))
    assert type(model.up).__name__ == "FP8Linear"
