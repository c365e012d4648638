"""Sampled positions of a base's tensors, and how their values are read."""

import math

import pytest
import torch
from torch import nn

from lorakit.core import fingerprint
from lorakit.core.model import base_samples
from lorakit.core.model.base_samples import (
    BUDGET,
    LEAST,
    MOST_SLICES,
    NUMBERS,
    agreement,
    positions,
    sample_count,
    take_samples,
    tensors_of_base,
)
from lorakit.core.model.fingerprint import DIFFERENT, compare

SHAPES = [("a", (300, 20)), ("b", (1 << 20, 1 << 13)), ("a", (20, 300)), ("c", (NUMBERS,))]


def test_positions_are_in_stretches_of_equal_length_with_both_ends() -> None:
    found = positions(SHAPES, NUMBERS)
    assert torch.equal(found, positions(SHAPES, NUMBERS)) and found.shape == (len(SHAPES), NUMBERS)
    for (_, shape), row in zip(SHAPES, found, strict=True):
        size = math.prod(shape)
        targets = row.tolist()
        assert targets[0] == 0 and targets[-1] == size - 1
        assert all(i * size // NUMBERS <= target < (i + 1) * size // NUMBERS for i, target in enumerate(targets))
    assert found[3].tolist() == list(range(NUMBERS))
    assert not torch.equal(found[0], found[2])


def test_positions_stay_what_files_say_they_are() -> None:
    assert positions([("model.norm.weight", (1000,))], 8).tolist() == [[0, 194, 308, 477, 587, 690, 819, 999]]


def test_every_slice_of_a_tensor_of_experts_is_sampled() -> None:
    for experts in (1, 3, 40, 64, 65, 128, MOST_SLICES):
        shape = (experts, 7, 50)
        count = sample_count(shape, 100)
        slices = positions([("experts", shape)], count)[0] // (7 * 50)
        assert count >= NUMBERS and set(slices.tolist()) == set(range(experts))
    assert sample_count((MOST_SLICES + 1, 7, 50), 100) == NUMBERS


def test_many_tensors_share_a_budget() -> None:
    assert sample_count((100, 100), 4096) == NUMBERS == BUDGET // 4096
    assert sample_count((100, 100), 20_000) == 13
    assert sample_count((128, 10, 10), 20_000) == 13
    assert sample_count((100, 100), 10**6) == LEAST
    assert sample_count((), 10) == 1 and sample_count((0, 3), 10) == 0


def test_above_a_limit_evenly_chosen_tensors_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ParameterDict({f"p{number:03}": nn.Parameter(torch.randn(3)) for number in range(100)})
    monkeypatch.setattr(base_samples, "MOST_TENSORS", 40)
    assert list(take_samples(tensors_of_base(model, {}), None)) == [f"p{number:03}" for number in range(0, 100, 3)]


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_keep_the_bits_of_their_dtype_wherever_they_are_in_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.randn(30, 40, dtype=torch.float64).to(dtype)
    model = nn.ParameterDict(
        {
            "empty": nn.Parameter(whole[:0], requires_grad=False),
            "plain": nn.Parameter(whole, requires_grad=False),
            "scalar": nn.Parameter(whole[0, 0], requires_grad=False),
            "turned": nn.Parameter(whole.T, requires_grad=False),
        }
    )
    found = take_samples(tensors_of_base(model, {}), None)
    assert list(found) == ["plain", "scalar", "turned"]
    for name, sample in found.items():
        tensor = model[name]
        targets = positions([(name, tuple(tensor.shape))], sample_count(tuple(tensor.shape), 4))[0]
        assert sample.dtype == str(dtype).removeprefix("torch.") and sample.is_sound()
        assert torch.equal(sample.values(), tensor.detach().double().reshape(-1)[targets])


def test_values_can_be_read_elsewhere() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9))
    there = {name: parameter.detach() for name, parameter in model.named_parameters()}
    plain = fingerprint(model)
    assert not fingerprint(model.to("meta")).samples
    assert fingerprint(model, read=lambda name: there[name]) == plain


def test_a_sample_without_some_places() -> None:
    sample = take_samples(tensors_of_base(_norm(), {}), None)["weight"]
    blank = sample.without([0, 2])
    assert blank.values().tolist() == [0.0, 2.0, 0.0] and agreement(sample, blank) == "apart"


def _norm() -> nn.Module:
    norm = nn.LayerNorm(3, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return norm


def test_a_change_of_some_values_is_missed_as_often_as_stated() -> None:
    model = nn.Sequential(nn.Linear(300, 300, bias=False))
    plain, seen = fingerprint(model), 0
    original = model[0].weight.detach().clone()
    for seed in range(200):
        chosen = torch.rand(original.shape, generator=torch.Generator().manual_seed(seed)) < 0.02
        with torch.no_grad():
            model[0].weight.copy_(torch.where(chosen, original + 1, original))
        seen += compare(plain, fingerprint(model)).verdict == DIFFERENT
    assert seen / 200 == pytest.approx(1 - 0.98**NUMBERS, abs=0.1)  # 0.73


@pytest.mark.gpu
def test_cuda_gives_the_samples_of_the_host() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 60), nn.LayerNorm(60), nn.Linear(60, 70, dtype=torch.bfloat16))
    on_host = fingerprint(model)
    assert fingerprint(model.to("cuda")) == on_host
