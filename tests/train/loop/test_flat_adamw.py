"""AdamW on flat buffers: the bits of torch's AdamW with any set of gradients, also after a tensor was replaced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import nn

from lorakit.core.files.tensors import encode
from lorakit.errors import RunError
from lorakit.train.loop import flat_adamw as flat
from lorakit.train.loop.flat_adamw import FlatAdamW, is_packable
from lorakit.train.loop.optimizer import (
    build_adamw,
    clipped_step,
    gradient_norm,
    load_state_tensors,
    set_rate,
    state_tensors,
)

SHAPES = [(16, 24), (16,), (40, 16), (32,), (4, 4), (0, 4), (48,), (64, 3)]
ODD = [(5, 7), (3,), (16, 24), (1, 1), (17,), (33, 3), (64,), (2, 2)]
RATES = {"t2": 0.03, "t7": 0.03}

Named = list[tuple[str, nn.Parameter]]


def _named(shapes: list[tuple[int, ...]] = SHAPES) -> Named:
    generator = torch.Generator().manual_seed(0)
    return [(f"t{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(shapes)]


def _plain(named: Named) -> torch.optim.AdamW:
    """Return torch's own AdamW with the groups of `build_adamw`."""
    groups = build_adamw(copy.deepcopy(named), 0.01, 0.1, RATES).param_groups
    sizes, members = [len(group["params"]) for group in groups], _by_group(named)
    assert sizes == [len(m) for m in members]
    return torch.optim.AdamW(
        [
            {"params": m, **{k: g[k] for k in ("lr", "share", "weight_decay")}}
            for m, g in zip(members, groups, strict=True)
        ],
        lr=0.01,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )


def _by_group(named: Named) -> list[list[nn.Parameter]]:
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in named:
        found.setdefault((RATES.get(name, 0.01), p.ndim > 1), []).append(p)
    return list(found.values())


def _gradients(named: Named, seed: int, skipped: tuple[int, ...] = (), size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, (_, p) in enumerate(named):
        p.grad = None if i in skipped else torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator)) * size


def _step(optimizer: torch.optim.Optimizer, named: Named, limit: float = 1.0) -> None:
    parameters = [p for _, p in named]
    clipped_step(optimizer, parameters, gradient_norm(parameters), limit)


def _equal(one: tuple[torch.optim.Optimizer, Named], two: tuple[torch.optim.Optimizer, Named]) -> None:
    for (name, a), (_, b) in zip(one[1], two[1], strict=True):
        assert torch.equal(a, b), name
    left, right = state_tensors(*one), state_tensors(*two)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype == torch.float32
        assert value.shape == right[key].shape
        assert torch.equal(value, right[key]), key


SKIPS: list[tuple[int, ...]] = [(4,), (), (0, 4), (2, 4, 7), (4, 6), (), (1, 2, 3, 4, 5, 6, 7)]
"""Tensors without a gradient in a step."""


@pytest.mark.parametrize("run", [1, 64, 1 << 20])
def test_the_bits_are_those_of_torchs_own(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without clipping, with tensors that lack a gradient in some or all steps, with runs of any length."""
    monkeypatch.setitem(flat._RUN, "cpu", run)
    ours, theirs = _named(), _named()
    one, two = build_adamw(ours, 0.01, 0.1, RATES), _plain(theirs)
    assert isinstance(one, FlatAdamW)
    for seed, skipped in enumerate(SKIPS):
        for optimizer, named in ((one, ours), (two, theirs)):
            _gradients(named, seed, (*skipped, 3), 0.001 if seed % 2 else 10)
            set_rate(optimizer, 0.01 / (seed + 1))
            _step(optimizer, named)
        _equal((one, ours), (two, theirs))
    assert "step/t3" not in state_tensors(one, ours)
    assert {key: int(value) for key, value in state_tensors(one, ours).items() if key.startswith("step")} == {
        "step/t0": 6, "step/t1": 6, "step/t2": 5, "step/t4": 2, "step/t5": 6, "step/t6": 5, "step/t7": 5,
    }  # fmt: skip


def test_tensors_of_odd_sizes_are_torchs_within_a_rounding_and_the_same_in_runs_of_any_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's kernel rounds v differently by one bit at the end of a tensor, after its last complete vector."""
    found = []
    for run in (1, 64, 1 << 20):
        monkeypatch.setitem(flat._RUN, "cpu", run)
        named = _named(ODD)
        optimizer = build_adamw(named, 0.01, 0.1, RATES)
        for seed, skipped in enumerate(SKIPS):
            _gradients(named, seed, skipped)
            _step(optimizer, named)
        found.append((optimizer, named))
    for other in found[1:]:
        _equal(found[0], other)
    theirs = _named(ODD)
    plain = _plain(theirs)
    for seed, skipped in enumerate(SKIPS):
        _gradients(theirs, seed, skipped)
        _step(plain, theirs)
    for key, value in state_tensors(plain, theirs).items():
        torch.testing.assert_close(state_tensors(*found[0])[key], value, rtol=1e-6, atol=1e-9, msg=key)
    for (name, a), (_, b) in zip(found[0][1], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_numbers_stay_where_reads_are_aligned_and_take_one_buffer_a_group() -> None:
    named, before = _named(ODD), _named(ODD)
    optimizer = build_adamw(named, 0.01, 0.1, RATES)
    for (_, p), (_, old) in zip(named, before, strict=True):
        assert torch.equal(p, old)
        assert p.is_contiguous()
        assert p.is_leaf
        assert p.data_ptr() % 64 == 0
    storages = [{p.untyped_storage().data_ptr() for p in group["params"] if p.numel()} for group in optimizer.param_groups]  # fmt: skip
    assert [len(found) for found in storages] == [1, 1, 1]
    assert not optimizer.state  # moments take no memory before the first step


def test_state_goes_through_a_file_that_holds_each_tensor_once() -> None:
    whole, parted = _named(ODD), _named(ODD)
    one, two = build_adamw(whole, 0.01, 0.1, RATES), build_adamw(parted, 0.01, 0.1, RATES)
    for seed in range(3):
        for optimizer, named in ((one, whole), (two, parted)):
            _gradients(named, seed, (4,) if seed == 1 else ())
            _step(optimizer, named)
    data = tensors_to_bytes(state_tensors(two, parted))
    numbers = sum(p.numel() for _, p in parted)
    assert len(data) < 8 * numbers + 4 * len(parted) + 4096
    assert len(encode(dict(parted), {})) < 4 * numbers + 1024
    again = build_adamw(parted, 0.01, 0.1, RATES)
    load_state_tensors(again, parted, tensors_from_bytes(data))
    for optimizer, named in ((one, whole), (again, parted)):
        _gradients(named, 9)
        _step(optimizer, named)
    _equal((one, whole), (again, parted))


def test_state_dicts_of_torch_are_taken() -> None:
    ours, theirs = _named(), _named()
    one, two = build_adamw(ours, 0.01, 0.1, RATES), _plain(theirs)
    for seed in range(2):
        _gradients(theirs, seed)
        _step(two, theirs)
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        a.data.copy_(b)
    one.load_state_dict({**one.state_dict(), "state": two.state_dict()["state"]})
    for optimizer, named in ((one, ours), (two, theirs)):
        _gradients(named, 5)
        _step(optimizer, named)
    _equal((one, ours), (two, theirs))


def _replace(named: Named, how: str) -> None:
    parameters = [p for _, p in named]
    if how == "one":
        parameters[2].data = parameters[2].data.flip(0)
    elif how == "all":
        for p in parameters:
            p.data = p.data * 1.5
    elif how == "swapped":
        a, b = nn.Parameter(torch.ones(16, 24)), parameters[0]
        a.data, b.data = b.data, a.data
    elif how == "strides":
        parameters[0].data = parameters[0].data.t().contiguous().t()
    elif how == "in place":
        parameters[0].data.mul_(2)
    elif how == "module":
        module = nn.ParameterDict(dict(named))
        module._apply(lambda t: t.clone())


@pytest.mark.parametrize("how", ["one", "all", "swapped", "strides", "in place", "module"])
def test_storage_that_was_replaced_is_taken_as_it_is(how: str) -> None:
    ours, theirs = _named(), _named()
    one, two = build_adamw(ours, 0.01, 0.1, RATES), _plain(theirs)
    for seed in range(3):
        for optimizer, named in ((one, ours), (two, theirs)):
            if seed == 1 and not (how == "strides" and optimizer is two):  # torch's own orders the moments differently
                _replace(named, how)
            _gradients(named, seed)
            _step(optimizer, named)
        _equal((one, ours), (two, theirs))


def test_whoever_holds_the_old_storage_keeps_its_numbers() -> None:
    """An example is an averaged copy that replaces the weights during evaluation."""
    named = _named()
    optimizer = build_adamw(named, 0.01, 0.1)
    p, average = named[0][1], torch.ones(16, 24)
    held = p.data
    p.data = average
    before = held.clone()
    _gradients(named, 0)
    _step(optimizer, named)
    assert torch.equal(held, before)
    assert not torch.equal(p, average)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.double(), r"to \(16, 24\) \(float64 on cpu\); build the optimizer after the model is moved"),
        (lambda p: p.bfloat16(), r"to \(16, 24\) \(bfloat16 on cpu\)"),
        (lambda p: p[:8], r"from \(16, 24\) \(float32 on cpu\) to \(8, 24\) \(float32 on cpu\)"),
    ],
    ids=["float64", "bfloat16", "shape"],
)
def test_another_tensor_is_refused_and_nothing_moves(change: Any, words: str) -> None:
    named = _named()
    optimizer = build_adamw(named, 0.01, 0.1, RATES)
    _gradients(named, 0)
    _step(optimizer, named)
    named[0][1].grad = None
    named[0][1].data = change(named[0][1].data)
    before = {name: p.detach().clone() for name, p in named[1:]}
    moments = {key: value.clone() for key, value in state_tensors(optimizer, named).items()}
    with pytest.raises(RunError, match=words):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in named[1:])
    assert all(torch.equal(value, moments[key]) for key, value in state_tensors(optimizer, named).items())


def test_tensors_that_came_to_lie_in_each_others_memory_are_refused() -> None:
    named = _named()
    optimizer = build_adamw(named, 0.01, 0.1)
    memory = torch.randn(40, 16)
    named[0][1].data, named[2][1].data = memory.view(-1)[: 16 * 24].view(16, 24), memory
    _gradients(named, 0)
    with pytest.raises(RunError, match=r"share memory; .* after replacing tensors"):
        optimizer.step()


def test_autograd_sees_that_a_tensor_was_stepped() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = build_adamw([("p", p)], 0.1, 0.0)
    loss = (p * p).sum()
    p.grad = torch.ones(4, 4)
    version = p._version
    optimizer.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_closure_is_called_with_gradients_on() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = build_adamw([("p", p)], 0.1, 0.0)

    def closure() -> torch.Tensor:
        loss = (p * p).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 2.0  # type: ignore[arg-type]
    assert torch.allclose(p.detach(), torch.full((2,), 0.9))


def _subclass() -> list[nn.Parameter]:
    class Own(torch.Tensor):
        pass

    return [nn.Parameter(torch.ones(2).as_subclass(Own))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [nn.Parameter(torch.ones(2, dtype=torch.float64))],
        lambda: [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))],
        lambda: [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))],
        lambda: [nn.Parameter(torch.ones(3, 2).t())],
        lambda: [nn.Parameter(torch.ones(1).expand(3))],
        _subclass,
    ],
    ids=["float64", "bfloat16", "devices", "strides", "expanded", "subclass"],
)
def test_tensors_that_cannot_lie_in_one_buffer_take_torchs_own(make: Any) -> None:
    parameters = make()
    assert not is_packable(parameters)
    named = [(f"t{i}", p) for i, p in enumerate(parameters)]
    assert isinstance(build_adamw(named, 0.1, 0.0), torch.optim.AdamW)


def test_tensors_in_each_others_memory_take_torchs_own() -> None:
    memory = torch.ones(6)
    assert not is_packable([nn.Parameter(memory[:4]), nn.Parameter(memory[3:])])
    assert is_packable([nn.Parameter(memory[:4]), nn.Parameter(memory[4:])])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_off_under_fsdp2(alone: None) -> None:
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, same = nn.Linear(4, 3), nn.Linear(4, 3)
    same.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    sharded, ours = (
        build_adamw(list(model.named_parameters()), 0.1, 0.1),
        build_adamw(list(same.named_parameters()), 0.1, 0.1),
    )
    assert isinstance(sharded, torch.optim.AdamW)
    assert isinstance(ours, FlatAdamW)
    x = torch.randn(5, 4)
    for optimizer, module in ((sharded, model), (ours, same)):
        module(x).square().sum().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor().detach(), b.detach())  # type: ignore[attr-defined]
