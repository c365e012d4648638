"""AdamW, its clipping, and its state by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, core
from lorakit.core.optimizers import LoraFA, Pair
from lorakit.errors import RunError
from lorakit.train.loop.optimizer import (
    build_adamw,
    build_optimizer,
    clipped_step,
    gradient_norm,
    load_state_tensors,
    parameter_groups,
    received_gradients,
    set_rate,
    state_tensors,
)
from lorakit.train.settings.settings import TrainSettings

from ... import small_models


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lorafa", "muon"])
def test_received_gradients_are_those_that_hooks_see(optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = small_models.mixtral(hidden_size=64, num_local_experts=8)
    model.model.layers[1].mlp.forward = torch.zeros_like
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj"]}
    core.attach(model, LoraConfig(r=8, **targets), "x")
    settings = TrainSettings(model="m", data="d", output_dir="o", optimizer=optimizer, learning_rate=1e-2)
    named, made = build_optimizer(model, "x", settings)
    seen = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in named}

    def watch(name: str, parameter: nn.Parameter) -> None:
        parameter.register_hook(lambda gradient: seen.__setitem__(name, seen[name] | (gradient != 0)))

    for one in named:
        watch(*one)
    for ids in ([[3, 4]], [[3, 4]], [[5, 3]]):
        model(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
        made.step()
        made.zero_grad()
    found = received_gradients(model, "x", made)
    expected = dict.fromkeys(found, False)
    for name, mark in seen.items():
        site = name.partition(".lora_")[0]
        if site.endswith("experts"):  # A (experts·r, in), B (out, r·experts)
            by_expert = mark.view(8, 8, -1) if "lora_A" in name else mark.view(-1, 8, 8).permute(2, 0, 1)
            for expert in range(8):
                expected[site, expert] |= bool(by_expert[expert].any())
        else:
            expected[site, 0] |= bool(mark.any())
    if optimizer == "adamw8bit":  # moves experts without a gradient too, because it stores their moments inexactly
        sites = {site: any(one for (path, _), one in expected.items() if path == site) for site, _ in expected}
        assert found == {key: sites[key[0]] for key in found}
        return
    assert found == expected
    trained = [sum(found[f"model.layers.{n}.mlp.experts", expert] for expert in range(8)) for n in (0, 1)]
    assert 2 <= trained[0] < 8 and trained[1] == 0


def _named() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [
        ("a.lora_A", nn.Parameter(torch.randn(2, 3))),
        ("a.lora_B", nn.Parameter(torch.randn(4, 2))),
        ("a.magnitude", nn.Parameter(torch.randn(4))),
    ]


def _step(named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_only_matrices_decay_and_the_optimizer_is_fused() -> None:
    optimizer = build_adamw(_named(), 0.1, 0.5)
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(2, 3): 0.5, (4, 2): 0.5, (4,): 0.0}
    assert optimizer.defaults["fused"]


def test_each_tensor_keeps_its_share_of_the_rate() -> None:
    named = _named()
    optimizer = build_adamw(named, 0.1, 0.5, {"a.lora_B": 0.8, "a.magnitude": 0.1})
    names = {id(p): name for name, p in named}
    for rate in (0.1, 0.025):
        set_rate(optimizer, rate)
        found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert found == pytest.approx({"a.lora_A": rate, "a.lora_B": 8 * rate, "a.magnitude": rate})


def test_lorafa_has_the_groups_of_adamw_and_goes_on_bit_for_bit() -> None:
    whole, parted = _named()[1:], _named()[1:]
    A = torch.randn(2, 3)

    def build(named: list[tuple[str, nn.Parameter]]) -> LoraFA:
        groups = parameter_groups(named, 0.1, 0.5, {"a.lora_B": 0.3})
        return LoraFA(groups, [Pair(named[0][1], A, 2.0)], lr=0.1)

    one, two = build(whole), build(parted)
    assert [(g["lr"], g["weight_decay"]) for g in one.param_groups] == [(pytest.approx(0.3), 0.5), (0.1, 0.0)]
    for seed in range(3):
        _step(whole, one, seed)
        _step(parted, two, seed)
    again = build(parted)
    load_state_tensors(again, parted, state_tensors(two, parted))
    for optimizer, named in ((one, whole), (again, parted)):
        set_rate(optimizer, 0.05)
        _step(named, optimizer, 9)
    for (_, a), (_, b) in zip(whole, parted, strict=True):
        assert torch.equal(a, b)


def test_nothing_to_train() -> None:
    with pytest.raises(RunError, match="no trainable tensors"):
        build_adamw([], 0.1, 0.0)


def test_state_put_back_goes_on_bit_for_bit() -> None:
    whole, parted = _named(), _named()
    one, two = build_adamw(whole, 0.1, 0.1), build_adamw(parted, 0.1, 0.1)
    for seed in range(3):
        _step(whole, one, seed)
        _step(parted, two, seed)
    again = build_adamw(parted, 0.1, 0.1)
    load_state_tensors(again, parted, state_tensors(two, parted))
    for optimizer, named in ((one, whole), (again, parted)):
        set_rate(optimizer, 0.05)
        _step(named, optimizer, 9)
    for (_, a), (_, b) in zip(whole, parted, strict=True):
        assert torch.equal(a, b)
    kept = state_tensors(again, parted)
    assert set(kept) == {f"{kind}/{name}" for name, _ in parted for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert all(torch.equal(value, kept[key]) for key, value in state_tensors(one, whole).items())


def test_state_of_another_adapter_is_refused_and_changes_nothing() -> None:
    named = _named()
    optimizer = build_adamw(named, 0.1, 0.0)
    for tensors in ({"exp_avg/a.lora_A": torch.zeros(3, 3)}, {"exp_avg/b": torch.zeros(2, 3)}, {"odd/a.lora_A": torch.zeros(2, 3)}):  # fmt: skip
        with pytest.raises(RunError, match="does not match this model's adapter"):
            load_state_tensors(optimizer, named, tensors)
    assert not optimizer.state


@pytest.mark.parametrize("plain", [False, True], ids=["flat", "plain"])
@pytest.mark.parametrize(("limit", "scaled"), [(1.0, True), (0.0, False), (1e9, False)])
def test_gradients_are_scaled_to_the_largest_norm(limit: float, scaled: bool, plain: bool) -> None:
    named, expected = _named(), _named()
    optimizer = torch.optim.SGD([p for _, p in named], 0.1) if plain else build_adamw(named, 0.1, 0.0)
    by_hand = torch.optim.SGD([p for _, p in expected], 0.1) if plain else build_adamw(expected, 0.1, 0.0)
    for (_, one), (_, two) in zip(named[:2], expected, strict=False):
        one.grad = torch.full_like(one, 3.0)
        two.grad = torch.full_like(two, 3.0 / (14 * 9) ** 0.5 if scaled else 3.0)
    parameters = [p for _, p in named]
    norm = gradient_norm(parameters)
    assert float(norm) == pytest.approx((14 * 9) ** 0.5)
    clipped_step(optimizer, parameters, norm, limit)
    by_hand.step()
    for (name, one), (_, two) in zip(named, expected, strict=True):
        torch.testing.assert_close(one, two, msg=name)
    if not plain:  # AdamW's step hardly depends on the size of a gradient, its moments do
        for key, value in state_tensors(by_hand, expected).items():
            torch.testing.assert_close(state_tensors(optimizer, named)[key], value, msg=key)


def test_no_gradient_has_no_length() -> None:
    assert float(gradient_norm([p for _, p in _named()])) == 0
