"""Models with quantized dense layers, one for each weight format whose package is installed.

Widths are multiples of 64: at others, the CPU kernel of bitsandbytes dequantizes to other values than it packed.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.model.base_view import quantized_linear, quantized_weights
from lorakit.plan.quantized import STORAGES, Quantization, Storage

from .snapshots import bits
from .zoo import Specimen

WRITTEN = {"nf4": 0.11, "fp4": 0.14, "hqq4": 0.11, "int8": 0.01, "int8-torchao": 0.01, "hqq8": 0.01}
"""Relative error that writing a merged weight into each storage may make."""

EVALUATED = {"int8": 0.02}
"""Where a forward in eval mode rounds what the plain product does not: bitsandbytes' int8 rounds activations too."""


def storages() -> list[Any]:
    """Return parameters for pytest: every weight format, skipped if its package is missing."""
    return [
        pytest.param(
            storage,
            id=storage.name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(storage.package) is None, reason=f"{storage.package} is not installed"
            ),
        )
        for storage in STORAGES
    ]


def specimen(storage: Storage) -> Specimen:
    """Return a model with two quantized layers, one of them with a bias, and a dense head."""

    def make() -> nn.Module:
        plain = _plain()
        for name in ("up", "square"):
            setattr(plain, name, quantized_linear(getattr(plain, name), Quantization(storage.name)))
        return plain

    return Specimen(storage.name, make, ("up", "square"), _numbers)


DENSE = Specimen("dense", lambda: _plain(), ("up", "square"), lambda rows: _numbers(rows))


def packed_bits(model: nn.Module) -> list[str]:
    """Return the SHA-256 of all tensors that store the quantized weights of a model, before any merge."""
    return [bits(tensor) for weight in quantized_weights(model) for tensor in weight.base.tensors(weight.stored)]


def _plain() -> nn.Module:
    layers = {"up": nn.Linear(64, 128), "square": nn.Linear(128, 128, bias=False), "out": nn.Linear(128, 7)}
    return nn.Sequential(
        OrderedDict(up=layers["up"], act=nn.Tanh(), square=layers["square"], last=nn.Tanh(), out=layers["out"])
    )


def _numbers(rows: int) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(7))
