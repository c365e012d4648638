"""Linear layers that are quantized alone, as transformers quantizes those of a model."""

from __future__ import annotations

from torch import nn

from lorakit.core.quantization.bitsandbytes import FOUR_BIT
from lorakit.core.quantization.hqq import hqq_linear
from lorakit.core.quantization.torchao import quantized_weight
from lorakit.core.quantization.weight_format import linear_with
from lorakit.plan.quantized import BLOCK, Quantization


def quantized_linear(linear: nn.Linear, wanted: Quantization) -> nn.Module:
    """Return a frozen, quantized copy of a linear layer, in the same mode (train or eval).

    The layer's dtype becomes the compute dtype; a 4-bit layer of bitsandbytes never repacks its weight.
    """
    package, bits = wanted.storage.package, wanted.storage.bits
    if package == "hqq":
        return hqq_linear(linear, bits, BLOCK)
    if package == "torchao":
        quantized = linear_with(linear, linear.weight.detach(), linear.weight.dtype)
        quantized.weight = quantized_weight(linear.weight.detach())
        return quantized
    quantized = _eight_bit(linear) if bits == 8 else _four_bit(linear, wanted.name, wanted.double)
    quantized.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    return quantized.train(linear.training)


def _four_bit(linear: nn.Linear, quant_type: str, double: bool) -> nn.Module:
    import bitsandbytes as package

    weight = linear.weight.detach()
    rows, columns = weight.shape
    settings: dict[str, str | bool] = {"compress_statistics": double, "quant_type": quant_type}
    quantized = package.nn.Linear4bit(columns, rows, False, weight.dtype, **settings, device="meta")
    parameter = package.nn.Params4bit(weight, requires_grad=False, **settings, module=quantized)
    FOUR_BIT.put_stored(quantized, "weight", parameter.to(weight.device))
    FOUR_BIT.disable_repacking(quantized)
    return quantized


def _eight_bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as package

    weight = linear.weight.detach()
    rows, columns = weight.shape
    quantized = package.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    parameter = package.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    quantized.weight = parameter.to(weight.device)
    return quantized
