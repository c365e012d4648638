"""Muon for A and B, AdamW for the rest: torch's steps, saved state, and an old torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.choices import OPTIMIZERS
from lorakit.config import LoraConfig
from lorakit.core.optimizers import trained_parts
from lorakit.errors import ConfigError, UsageError
from lorakit.train.loop.optimizer import (
    Named,
    build_optimizer,
    check_optimizer,
    clipped_step,
    gradient_norm,
    load_state_tensors,
    set_rate,
    state_tensors,
)
from lorakit.train.loop.optional_optimizers import Muon, check_muon
from lorakit.train.settings.settings import TrainSettings

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")


class Net(nn.Module):
    """An embedding, two linear layers, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.two = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.conv, self.head = nn.Conv1d(12, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.two(torch.tanh(self.one(self.embed(ids))))
        output: torch.Tensor = self.head(self.conv(hidden.mT).mT)
        return output


def adapted(**fields: Any) -> nn.Module:
    model = Net()
    torch.manual_seed(1)
    core.attach(model, LoraConfig(**{"r": 4, "target_modules": ["one", "two"], **fields}), "default")
    return model


def settings(**values: Any) -> TrainSettings:
    return TrainSettings(**{
        "model": "m", "data": "d.txt", "output_dir": "out", "optimizer": "muon", "learning_rate": 0.01,
        "weight_decay": 0.1, **values,
    })  # fmt: skip


def gradients(named: Named, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@needs_muon
def test_the_steps_are_those_of_torch() -> None:
    """Also with clipping, LoRA+ and a rate by pattern; the magnitudes of DoRA are left to AdamW."""
    more = {"loraplus_lr_ratio": 4.0, "learning_rate_pattern": {"two": 0.02}}
    model = adapted(use_dora=True)
    named, optimizer = build_optimizer(model, "default", settings(**more))
    assert isinstance(optimizer, Muon)
    copies = [nn.Parameter(p.detach().clone()) for _, p in named]
    plain: list[torch.optim.Optimizer] = []
    for (name, _), copy in zip(named, copies, strict=True):
        rate = (0.02 if "two" in name else 0.01) * (1 if "lora_A" in name else 4)
        if copy.ndim == 2:
            plain.append(torch.optim.Muon([copy], lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
        else:
            plain.append(torch.optim.AdamW([copy], lr=rate, weight_decay=0.0, fused=True))
    for seed in range(3):
        gradients(named, seed)
        for (_, parameter), copy in zip(named, copies, strict=True):
            copy.grad = parameter.grad.clone()  # type: ignore[union-attr]
        parameters = [p for _, p in named]
        clipped_step(optimizer, parameters, gradient_norm(parameters), 1.0)
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        for one in plain:
            one.step()
    for (name, parameter), copy in zip(named, copies, strict=True):
        assert torch.equal(parameter, copy), name


@needs_muon
def test_only_factors_of_single_matrices_are_orthogonalized() -> None:
    fields = {"target_modules": ["one", "two", "embed", "conv"], "modules_to_save": ["head"], "bias": "all"}
    model = adapted(**fields)
    named, optimizer = build_optimizer(model, "default", settings())
    gradients(named, 0)
    optimizer.step()
    found = {name for name, p in named if "momentum_buffer" in optimizer.state[p]}
    assert found == {f"{site}.lora_{factor}.default.weight" for site in ("one", "two") for factor in "AB"}
    assert found == {part.name for part in trained_parts(model) if part.is_matrix}
    assert all(set(optimizer.state[p]) >= {"exp_avg", "exp_avg_sq"} for name, p in named if name not in found)


@needs_muon
def test_saved_state_goes_on_bit_for_bit() -> None:
    built = [build_optimizer(adapted(use_dora=True), "default", settings()) for _ in range(2)]
    (whole, one), (parted, two) = built
    for seed in range(3):
        for named, optimizer in built:
            gradients(named, seed)
            optimizer.step()
    saved = state_tensors(two, parted)
    model = adapted(use_dora=True)
    again, resumed = build_optimizer(model, "default", settings())
    with torch.no_grad():
        for (_, new), (_, old) in zip(again, parted, strict=True):
            new.copy_(old)
    load_state_tensors(resumed, again, saved)
    for named, optimizer in ((whole, one), (again, resumed)):
        set_rate(optimizer, 0.005)
        gradients(named, 9)
        optimizer.step()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, again, strict=True))


@needs_muon
def test_the_rate_reaches_both_parts() -> None:
    named, optimizer = build_optimizer(adapted(use_dora=True), "default", settings(weight_decay=0.0))
    gradients(named, 0)
    before = [p.detach().clone() for _, p in named]
    set_rate(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


@needs_muon
def test_a_closure_is_called_once_with_gradients_on_before_any_update() -> None:
    model = adapted(use_dora=True)  # with DoRA's magnitudes, which AdamW updates
    named, optimizer = build_optimizer(model, "default", settings())
    before = [p.detach().clone() for _, p in named]
    calls = []

    def closure() -> float:
        calls.append(
            torch.is_grad_enabled() and all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
        )
        gradients(named, 0)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert calls == [True]
    assert not any(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


@needs_muon
def test_an_adapter_without_a_matrix() -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(adapted(target_modules=["embed"]), "default", settings())
    assert (caught.value.field, caught.value.what) == ("optimizer", "muon")


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UsageError) as caught:
        check_optimizer("muon", torch.device("cpu"))
    assert (caught.value.field, caught.value.what) == ("optimizer", "muon")
    assert caught.value.allowed == tuple(name for name in OPTIMIZERS if name != "muon")
    assert "2.9" in str(caught.value) and torch.__version__ in str(caught.value)
    check_optimizer("adamw", torch.device("cpu"))
    with pytest.raises(UsageError):
        check_muon(torch.device("cpu"))
