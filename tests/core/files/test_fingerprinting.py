"""The base's fingerprint: blind to adapters, merges and trained biases; four verdicts with their reasons."""

import copy

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, core
from lorakit.core.files.fingerprinting import (
    DIFFERENT,
    OTHER_PRECISION,
    SAME,
    UNVERIFIABLE,
    Fingerprint,
    compare,
    fingerprint,
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))


def test_adapters_merges_and_biases_do_not_change_it(model: nn.Module) -> None:
    plain = fingerprint(model)
    core.attach(model, LoraConfig(target_modules=["1"], bias="all", modules_to_save=["2"], init_lora_weights=False))
    with torch.no_grad():
        for _, parameter in core.trainable_parameters(model):
            parameter.add_(1.0)
    assert fingerprint(model) == plain
    core.merge(model)
    assert fingerprint(model) == plain


def test_the_same_base(model: nn.Module) -> None:
    assert compare(fingerprint(model), fingerprint(copy.deepcopy(model)))[0] == SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_precision_is_still_the_same_base(model: nn.Module, dtype: torch.dtype) -> None:
    verdict, reason = compare(fingerprint(model), fingerprint(copy.deepcopy(model).to(dtype)))
    assert verdict == OTHER_PRECISION and "the adapter's base was float32" in reason


def test_rounding_twice_is_within_one_step(model: nn.Module) -> None:
    twice = copy.deepcopy(model).to(torch.float16).to(torch.bfloat16)
    assert compare(fingerprint(model), fingerprint(twice))[0] == OTHER_PRECISION


def test_other_weights_of_the_same_shape_are_another_base(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(1.02)
    verdict, reason = compare(fingerprint(model), fingerprint(other))
    assert verdict == DIFFERENT and reason == "the numbers of 1.weight differ: same shapes, other weights"


def test_other_shapes_are_another_base(model: nn.Module) -> None:
    verdict, reason = compare(fingerprint(model), fingerprint(nn.Sequential(*model, nn.Linear(9, 9))))
    assert verdict == DIFFERENT and reason.startswith("names or shapes of the base's parameters differ")


def test_another_architecture_is_named(model: nn.Module) -> None:
    verdict, reason = compare(fingerprint(model), fingerprint(nn.Linear(8, 8)))
    assert (verdict, reason) == (DIFFERENT, "the adapter's base is a Sequential, this model is a Linear")


def test_without_a_fingerprint_or_numbers_nothing_can_be_said(model: nn.Module) -> None:
    assert compare(None, fingerprint(model))[0] == UNVERIFIABLE
    assert compare(fingerprint(model), fingerprint(copy.deepcopy(model).to("meta")))[0] == UNVERIFIABLE


def test_it_survives_json(model: nn.Module) -> None:
    made = fingerprint(model)
    assert Fingerprint.from_dict(made.as_dict()) == made
