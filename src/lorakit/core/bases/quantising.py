"""A dense layer in fewer bits, and a whole model back: which quantiser makes which of the words of `--quantization`.

For models that transformers does not load, and for storages that it cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakit.core.bases.bitsandbytes import eight_bit_linear, four_bit_linear
from lorakit.core.bases.hqq import hqq_linear
from lorakit.core.bases.torchao import int8_linear
from lorakit.core.layering.underlying import float_dtype, quantised_weights
from lorakit.plan.quantised import BLOCK, Quantization

PLACES, ROUNDING = 4096, 1e-2
"""At how many places a weight is checked, and what kernels may round, over its largest number."""


def multiply_out(model: nn.Module) -> int:
    """Put a plain module in the place of every quantised one of a model that has no adapters.

    Args:
        model: The model, changed in place; each plain weight has the dtype of the quantised one's products.

    Returns:
        How many modules were replaced.

    Raises:
        MergeError: A weight cannot be read.
    """
    dtype = float_dtype(model)
    plain = [(weight.packed.rpartition(".")[0], weight.multiplied_out(dtype)) for weight in quantised_weights(model)]
    for path, module in plain:
        model.set_submodule(path, module)
    return len(plain)


def wrongly_multiplied_out(model: nn.Module) -> tuple[str, float] | None:
    """A weight whose package multiplies out other numbers than it packed, which a kernel may do for some widths.

    One weight of each shape is compared, at a few thousand places, with what the packed bytes mean.

    Args:
        model: A model with or without adapters.

    Returns:
        The weight's name and the largest difference over the largest number, or None where all is right.
    """
    seen = set()
    for weight in quantised_weights(model):
        module: Any = weight.module
        shape = (weight.base.name, module.out_features, module.in_features)
        if shape in seen:
            continue
        seen.add(shape)
        whole = weight.base.read(module, weight.stored).reshape(-1)
        places = torch.linspace(0, whole.numel() - 1, min(PLACES, whole.numel()), dtype=torch.float64).long()
        meant, bound = weight.base.values(weight.stored, places)
        difference = (whole[places.to(whole.device)] - meant).abs()[bound.isfinite()]
        error = float(difference.max() / whole.abs().max().clamp_min(1e-30)) if difference.numel() else 0.0
        if not error <= ROUNDING:
            return weight.name, error
    return None


def quantised_linear(linear: nn.Linear, wanted: Quantization) -> nn.Module:
    """A dense layer as a quantiser stores it.

    Args:
        linear: The layer; its dtype becomes that of the products. Its weight may be given up.
        wanted: How to store it.

    Returns:
        The layer to put in its place, in the same mode, frozen.
    """
    package, bits = wanted.storage.package, wanted.storage.bits
    if package == "hqq":
        return hqq_linear(linear, bits, BLOCK)
    if package == "torchao":
        return int8_linear(linear)
    if bits == 8:
        return eight_bit_linear(linear)
    return four_bit_linear(linear, wanted.name, wanted.double)
