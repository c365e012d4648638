"""Models with quantized dense layers, one for each weight format whose package is installed.

Widths are multiples of 64: at others, the CPU kernel of bitsandbytes dequantizes to other values than it packed.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tests.quantized_layers import quantized_linear
from torch import Tensor, nn

from lorakit.choices import DENSE as DENSE_KINDS
from lorakit.core.model.base_view import quantized_weights
from lorakit.core.quantization.int8_linear import int8_matmul_linear
from lorakit.ops.int8_weight import input_scales
from lorakit.plan.quantized import STORAGES, Quantization, Storage

from .snapshots import bits
from .zoo import Specimen

WRITTEN = {
    "nf4": 0.11,
    "fp4": 0.14,
    "hqq4": 0.11,
    "int8": 0.01,
    "int8-torchao": 0.01,
    "hqq8": 0.01,
    "int8-matmul": 0.02,
}
"""Relative error that writing a merged weight into each storage may make."""

EVALUATED = {"int8": 0.02, "int8-matmul": 0.04}
"""Formats that round activations too, bitsandbytes' int8 only in eval mode: error of the output."""

INT8_MATMUL = Storage("int8-matmul", "torch", "int8 matmuls (W8A8)", 8, DENSE_KINDS, False, "nothing", lambda *_: 0)
"""The format of `quantize_base`, which is not a value of `--quantization`."""


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
        for storage in (*STORAGES, INT8_MATMUL)
    ]


def specimen(storage: Storage) -> Specimen:
    """Return a model with two quantized layers, one of them with a bias, and a dense head."""

    def make() -> nn.Module:
        plain = _plain()
        for name in ("up", "square"):
            setattr(plain, name, stored_linear(getattr(plain, name), storage))
        return plain

    return Specimen(storage.name, make, ("up", "square"), _numbers)


def stored_linear(linear: nn.Linear, storage: Storage) -> nn.Module:
    """Return a version of a dense layer in a weight format."""
    if storage is not INT8_MATMUL:
        return quantized_linear(linear, Quantization(storage.name))
    largest = torch.rand(linear.in_features, generator=torch.Generator().manual_seed(5)) + 0.5
    return int8_matmul_linear(linear, *input_scales(largest, [linear.weight], kept=4))


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
