"""Weights quantized by HQQ (half-quadratic quantization), with a scale and a zero point per group of values.

This is the only module that imports HQQ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.core.quantization.weight_format import Packed, WeightFormat

if TYPE_CHECKING:
    from hqq.core.quantize import HQQLinear

PARAMETER = "W_q"


@dataclass(frozen=True)
class HQQWeight(Packed):
    """A weight quantized by HQQ, and the module's metadata: "scale", "zero", "shape", "nbits", "group_size", …"""

    packed: Tensor
    meta: dict[str, Any]


def hqq_linear(linear: nn.Linear, bits: int, group_size: int) -> nn.Module:
    """Return an `HQQLinear` with 8 or 4 bits, computing in the dense layer's dtype, and take the weight from the dense
    layer.

    `group_size` values share a scale; it must divide the number of elements evenly.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear.requires_grad_(False)  # HQQ would copy a trainable bias as a non-leaf tensor, which deepcopy rejects
    weight = linear.weight
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    quantized: nn.Module = HQQLinear(linear, config, compute_dtype=weight.dtype, device=str(weight.device))
    return quantized.train(linear.training)


class HQQFormat(WeightFormat["HQQLinear", HQQWeight]):
    """Format of an `HQQLinear` weight, which consists of packed values, scales and zero points."""

    def stored(self, module: HQQLinear, parameter: str) -> HQQWeight:
        """Return the packed weight of a layer."""
        return HQQWeight(module.W_q, module.meta)

    def read(self, module: HQQLinear, stored: HQQWeight) -> Tensor:
        """Return the dequantized weight, (out, in), in fp32."""
        if _has_packed_scales(stored.meta):
            return module.dequantize().float()  # an old format that only the module itself can read
        from hqq.core.quantize import Quantizer

        return Quantizer.dequantize(stored.packed, {**stored.meta, "compute_dtype": torch.float32}).float()

    def write(self, module: HQQLinear, like: HQQWeight, canonical: Tensor) -> HQQWeight:
        """Quantize a weight (out, in) with the settings of a layer."""
        settings = copy.deepcopy(module.quant_config)
        whole = {**settings, "offload_meta": module.offload_meta}
        other = type(module)(None, whole, compute_dtype=module.compute_dtype, device=module.device)
        other.quantize(canonical.to(device=module.W_q.device), **settings)
        return HQQWeight(other.W_q, other.meta)

    def put_stored(self, module: HQQLinear, parameter: str, stored: HQQWeight) -> None:
        """Write a packed weight to a layer."""
        module._parameters[PARAMETER], module.meta = stored.packed, stored.meta

    def dense(self, module: HQQLinear, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
        """Return an nn.Linear with a weight (out, in) in the layer's compute dtype."""
        return super().dense(module, canonical, module.compute_dtype)

    def tensors(self, stored: HQQWeight) -> tuple[Tensor, ...]:
        """Return the packed values, the scales and the zero points, as tensors of any shape."""
        return (stored.packed, *(entry for entry in stored.meta.values() if isinstance(entry, Tensor)))

    def values(self, stored: HQQWeight, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,), each equal to (code − zero) · scale, and bounds on their errors (n,).

        With 4 bits, the upper nibbles hold the codes of the first half of the groups. No error exceeds one quantization
        step.
        """
        meta = stored.meta
        bits, group = meta["nbits"], meta["group_size"]
        if _has_packed_scales(meta) or meta["axis"] != 1 or bits not in (4, 8) or meta["view_as_float"]:
            empty = torch.zeros(positions.shape, device=stored.packed.device)
            return empty, torch.full_like(empty, torch.inf)
        packed = stored.packed
        positions = positions.to(packed.device)
        groups, within = positions // group, positions % group
        if bits == 4:
            half = packed.shape[0]
            pairs = packed[groups % half, within]
            codes = torch.where(groups < half, pairs >> 4, pairs & 0xF).float()
        else:
            codes = packed[groups, within].float()
        steps = meta["scale"].float().reshape(-1)[groups]
        return (codes - meta["zero"].float().reshape(-1)[groups]) * steps, steps.abs()


def _has_packed_scales(meta: Mapping[str, Any]) -> bool:
    return bool(meta.get("quant_zero") or meta.get("quant_scale") or "zero_scale" in meta)


HQQ = HQQFormat("HQQ", ("hqq.core.quantize.HQQLinear",))
