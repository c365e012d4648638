"""Loss scaling of an fp16 base: small gradients are kept, overflows skip steps, and the scaler's state is restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.data import Batch
from lorakit.errors import ConfigError, NonFiniteError
from lorakit.train.loop.optimizer import (
    build_adamw,
    check_named_in_fp32,
    check_trained_in_fp32,
    loss_scaler,
    scaler_state,
)
from lorakit.train.loop.step import StepOptions, StepResult, train_step

CPU = torch.device("cpu")
BATCH = Batch(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.long), torch.tensor([[-100, 2]]), 0.5, 2, 1)


class Factor(nn.Module):
    """A trainable number in fp32 that is multiplied by a constant in fp16, as in a factor on an fp16 base."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1))


class Stepper:
    """Steps with a loss of `slope` times the factor, whose gradient passes through fp16."""

    def __init__(self, scaler: torch.amp.GradScaler | None, max_grad_norm: float = 0.0) -> None:
        self.model = Factor()
        self.named = [("a", self.model.a)]
        self.optimizer = build_adamw(self.named, 0.1, 0.0)
        self.slope, self.options = 1.0, StepOptions(CPU, max_grad_norm, scaler=scaler, loss=self._loss)

    def _loss(self, model: Any, *_: Any) -> torch.Tensor:
        return (model.a.half() * self.slope).float().sum()

    def step(self, slope: float) -> StepResult:
        self.slope = slope
        return train_step(self.model, self.named, self.optimizer, [BATCH], 0.1, self.options)


def scaler(scale: float = 2.0**16) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_only_a_base_in_fp16_has_a_scaler() -> None:
    assert loss_scaler(CPU, "bfloat16") is None and loss_scaler(CPU, "float32") is None
    assert scaler_state(None) == {}
    found = loss_scaler(CPU, "float16")
    assert found is not None and found.get_scale() == 2.0**16
    assert loss_scaler(CPU, "float16", {**scaler_state(found), "scale": 8.0}).get_scale() == 8.0  # type: ignore[union-attr]


def test_gradients_that_fp16_rounds_to_zero_survive() -> None:
    tiny = 2.0**-26  # half of the smallest fp16 number
    plain, scaled = Stepper(None), Stepper(scaler())

    def loss(model: Any, *_: Any) -> torch.Tensor:
        return model.a.half().float().sum() * tiny

    for one in (plain, scaled):
        object.__setattr__(one.options, "loss", loss)
    assert plain.step(1.0).grad_norm == 0.0
    assert scaled.step(1.0).grad_norm == tiny


def test_the_norm_and_the_clipping_are_those_without_the_scale() -> None:
    plain, scaled = Stepper(None, 0.5), Stepper(scaler(256.0), 0.5)
    for slope in (3.0, 2.0, 0.25):
        one, other = plain.step(slope), scaled.step(slope)
        assert (one.loss, one.grad_norm, one.is_skipped) == (other.loss, other.grad_norm, other.is_skipped)
    assert torch.equal(plain.model.a, scaled.model.a)


def test_a_gradient_that_overflows_skips_the_step_and_halves_the_scale() -> None:
    whole = Stepper(scaler())
    before = whole.model.a.detach().clone()
    result = whole.step(4.0)  # 4 × 65,536 overflows
    assert result.is_skipped and result.loss == 4.0 and whole.options.scaler is not None
    assert torch.equal(whole.model.a, before) and not whole.optimizer.state.get(whole.model.a)
    assert whole.options.scaler.get_scale() == 2.0**15
    skipped = [whole.step(4.0).is_skipped for _ in range(4)]
    assert skipped == [True, True, False, False] and not torch.equal(whole.model.a, before)


def test_a_gradient_that_overflows_without_a_scale_is_an_error() -> None:
    whole = Stepper(scaler(1.0))
    object.__setattr__(whole.options, "loss", lambda model, *_: model.a.half().sum().float() * 1e6)
    with pytest.raises(NonFiniteError) as caught:
        whole.step(1.0)
    assert caught.value.what == "gradient norm" and torch.equal(whole.model.a.detach(), torch.ones(1))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    whole = Stepper(scaler())
    with pytest.raises(NonFiniteError) as caught:
        whole.step(1e6)  # overflows in the forward pass
    assert caught.value.what == "loss" and whole.options.scaler is not None
    assert whole.options.scaler.get_scale() == 2.0**16 and whole.model.a.grad is None


def test_parameters_are_not_trained_in_fp16() -> None:
    check_trained_in_fp32("float16", 0)
    check_trained_in_fp32("bfloat16", 7)
    with pytest.raises(ConfigError, match="7 parameters") as caught:
        check_trained_in_fp32("float16", 7)
    assert caught.value.field == "dtype" and "bfloat16" in caught.value.allowed
    check_named_in_fp32([("a", nn.Parameter(torch.ones(2)))], "float16")
    with pytest.raises(ConfigError, match="2 parameters"):
        check_named_in_fp32([("a", nn.Parameter(torch.ones(2).half()))], "float16")
