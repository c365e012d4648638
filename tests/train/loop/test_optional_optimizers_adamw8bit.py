"""AdamW with 8-bit state: bitsandbytes' steps, what is saved, and machines that cannot take them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import nn

from lorakit.choices import OPTIMIZERS
from lorakit.errors import MissingExtra, UsageError
from lorakit.plan.optimizer_state import SMALLEST_8BIT
from lorakit.train.loop.optimizer import (
    Named,
    clipped_step,
    gradient_norm,
    load_state_tensors,
    parameter_groups,
    set_rate,
    state_tensors,
)
from lorakit.train.loop.optional_optimizers import adamw8bit, check_adamw8bit

package = pytest.importorskip("bitsandbytes")
RATES = {"B": 0.03}


def tensors() -> Named:
    torch.manual_seed(0)
    shapes = {"A": (16, 300), "B": (520, 16), "small": (16, 16), "magnitude": (520,)}
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def built(named: Named) -> torch.optim.Optimizer:
    return adamw8bit(parameter_groups(named, 0.01, 0.1, RATES), 0.01)


def step(named: Named, optimizer: torch.optim.Optimizer, seed: int, clip: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parameters = [p for _, p in named]
    clipped_step(optimizer, parameters, gradient_norm(parameters), clip)


def test_the_steps_are_those_of_bitsandbytes() -> None:
    ours, theirs = tensors(), tensors()
    optimizer = built(ours)
    plain = [
        package.optim.AdamW8bit([p], lr=RATES.get(name, 0.01), weight_decay=0.1 if p.ndim > 1 else 0.0)
        for name, p in theirs
    ]
    for seed in range(3):
        step(ours, optimizer, seed, clip=1.0)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in theirs:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch.nn.utils.clip_grad_norm_([p for _, p in theirs], 1.0)
        for one in plain:
            one.step()
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), name


def test_saved_state_stays_in_8_bits_and_goes_on_bit_for_bit() -> None:
    whole, parted = tensors(), tensors()
    one, two = built(whole), built(parted)
    for seed in range(3):
        step(whole, one, seed)
        step(parted, two, seed)
    saved = tensors_from_bytes(tensors_to_bytes(state_tensors(two, parted)))
    for name, parameter in parted:
        is_large = parameter.numel() >= SMALLEST_8BIT
        assert saved[f"state1/{name}"].dtype == saved[f"state2/{name}"].dtype
        assert saved[f"state1/{name}"].dtype == (torch.uint8 if is_large else torch.float32)
        assert (f"absmax1/{name}" in saved) == (f"qmap2/{name}" in saved) == is_large
    again = built(parted)
    load_state_tensors(again, parted, saved)
    for optimizer, named in ((one, whole), (again, parted)):
        set_rate(optimizer, 0.005)
        step(named, optimizer, 9)
        assert optimizer.state[named[0][1]]["step"] == 4
    for (_, a), (_, b) in zip(whole, parted, strict=True):
        assert torch.equal(a, b)
    after, expected = state_tensors(again, parted), state_tensors(one, whole)
    assert after.keys() == expected.keys()
    assert all(torch.equal(value, after[key]) for key, value in expected.items())


def test_a_step_is_seen_by_whoever_caches_by_version() -> None:
    named = tensors()
    optimizer, before = built(named), [p._version for _, p in named]
    named[-1][1].grad = None
    for _, parameter in named[:-1]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [p._version > version for (_, p), version in zip(named, before, strict=True)] == [True, True, True, False]


def test_the_check_passes_on_this_machine() -> None:
    check_adamw8bit(torch.device("cpu"))


def test_a_device_without_8_bit_steps_is_named_with_the_other_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: object, closure: object = None) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(package.optim.AdamW8bit, "step", step)
    with pytest.raises(UsageError) as caught:
        check_adamw8bit(torch.device("cpu"))
    assert (caught.value.field, caught.value.what, caught.value.where) == ("optimizer", "adamw8bit", "cpu")
    assert caught.value.allowed == tuple(name for name in OPTIMIZERS if name != "adamw8bit")
    assert "no kernel" in str(caught.value)


def test_without_bitsandbytes_the_error_gives_the_pip_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lorakit.train import TrainSettings, run

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    text = tmp_path / "text.txt"
    text.write_text("words")
    settings = TrainSettings(
        model=tmp_path / "no-model", data=text, output_dir=tmp_path / "run", optimizer="adamw8bit", device="cpu"
    )
    with pytest.raises(MissingExtra) as caught:  # before the model is even looked for
        run(settings)
    assert caught.value.what == "bitsandbytes"
    assert "pip install 'lorakit[quant]'" in str(caught.value)
    assert not (tmp_path / "run").exists()
