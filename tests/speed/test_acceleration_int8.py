"""Int8 matmuls in `accelerate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core import Int8Linear
from lorakit.errors import ConfigError, MergeError
from lorakit.ops.int8 import why_no_int8_matmuls
from lorakit.speed import accelerate, acceleration

from .. import small_models
from ..core.int8.test_quantized_base import batches, bits, llama, logits

NEEDS_INT8 = pytest.mark.skipif(why_no_int8_matmuls() != "", reason="the processor has no int8 units")


def adapted(**fields: Any) -> nn.Module:
    """Return a model with an adapter whose B is not zero."""
    model = llama()
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **fields))
    return model


def gradients(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a training step, and the gradients of A and B."""
    torch.manual_seed(0)
    model.train().zero_grad()
    loss = model(**batches()[0]).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for _, parameter in core.trainable_parameters(model)]


@NEEDS_INT8
@pytest.mark.parametrize("attach_first", [True, False])
def test_the_base_is_int8_and_undo_restores_it(attach_first: bool) -> None:
    model = adapted() if attach_first else llama()
    before = logits(model)
    made = accelerate(model, base_matmul="int8", calibration=batches(), keep=True)
    assert made.int8 is not None and len(made.int8.paths) == 14
    assert "int8 in 14 modules" in str(made)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 14
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()
    made.undo()
    assert torch.equal(logits(model), before)


@NEEDS_INT8
def test_the_values_of_an_adapter_do_not_decide_which_rows_are_skipped() -> None:
    """Otherwise a resumed run would round differently."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = small_models.llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
        core.attach(model, LoraConfig(r=4, target_modules="all-linear"), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in core.trainable_parameters(model):
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype)
        ids = torch.randint(0, 61, (2, 16), generator=generator)
        made = accelerate(model, base_matmul="int8", calibration=[{"input_ids": ids}])
        assert made.head is not None and made.head.last is not None


@NEEDS_INT8
def test_the_fused_step_equals_the_plain_int8_step() -> None:
    plain, fused = adapted(), adapted()
    core.quantize_base(plain, batches())
    accelerate(fused, base_matmul="int8", calibration=batches())
    loss, wanted = gradients(plain)
    found, ours = gradients(fused)
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=0)
    for one, other in zip(ours, wanted, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


@NEEDS_INT8
def test_dropout_is_that_of_the_fused_step_with_a_dense_base() -> None:
    """Fused dropout draws another mask than the plain layers, so the step is compared with a fused one."""
    dense, fused = adapted(lora_dropout=0.5), adapted(lora_dropout=0.5)
    accelerate(dense)
    accelerate(fused, base_matmul="int8", calibration=batches())
    loss, wanted = gradients(dense)
    found, ours = gradients(fused)
    torch.testing.assert_close(found, loss, rtol=1e-2, atol=0)
    for one, other in zip(ours, wanted, strict=True):
        assert (one - other).norm() <= 0.15 * other.norm()


@NEEDS_INT8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_int8_layers_run_in_fused_forwards(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted().to(dtype)
    made = accelerate(model, base_matmul="int8", calibration=batches())
    assert not made.skipped
    assert "2 × LlamaDecoderLayer: decoder layer" in str(made)
    own: list[nn.Module] = []
    monkeypatch.setattr(Int8Linear, "__call__", lambda self, x: own.append(self))
    gradients(model)
    assert not own


@NEEDS_INT8
def test_a_replaced_forward_of_an_int8_layer_runs() -> None:
    model = llama()
    core.quantize_base(model, batches())
    accelerate(model)
    layer = next(module for module in model.modules() if isinstance(module, Int8Linear))
    before, forward, ran = logits(model), layer.forward, []
    layer.forward = lambda x: (ran.append(1), forward(x))[1]  # type: ignore[method-assign]
    assert (logits(model) - before).norm() <= 1e-2 * before.norm()
    assert ran


@NEEDS_INT8
def test_without_the_originals_undo_says_that_they_cannot_be_restored() -> None:
    made = accelerate(llama(), base_matmul="int8", calibration=batches())
    with pytest.raises(MergeError) as raised:
        made.undo()
    assert raised.value.field == "keep"


def test_wrong_requests_change_nothing() -> None:
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (llama(), {"base_matmul": "int4"}, "base_matmul"),
        (llama(), {"base_matmul": "int8"}, "calibration"),
    ]
    quantized = llama()
    core.quantize_base(quantized, batches())
    if not why_no_int8_matmuls():
        cases += [
            (quantized, {"base_matmul": "int8", "calibration": batches()}, "base_matmul"),
            (llama().requires_grad_(True), {"base_matmul": "int8", "calibration": batches()}, "base_matmul"),
        ]
    for model, options, field in cases:
        before = bits(model)
        with pytest.raises(ConfigError) as raised:
            accelerate(model, **options)
        assert raised.value.field == field and bits(model) == before


def test_without_int8_units_the_model_keeps_its_dtype_and_the_reason_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceleration, "why_no_int8_matmuls", lambda: "no int8 units")
    model = llama()
    made = accelerate(model, base_matmul="int8", calibration=batches())
    assert made.int8 is None and made.int8_skipped == "no int8 units"
    assert "not in int8 (no int8 units)" in str(made)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
