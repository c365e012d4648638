"""The door to HQQ: half-quadratic quantisation, a scale and a zero point for each group of numbers.

A stored weight is the packed parameter and the table of facts that the module keeps beside it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.quantization.weight_format import WeightFormat, linear_with

PARAMETER = "W_q"

Stored = tuple[Tensor, dict[str, Any]]
"""The packed numbers, and "scale", "zero", "shape", "nbits", "group_size", ..."""


def hqq_linear(linear: nn.Linear, bits: int, group_size: int) -> nn.Module:
    """A dense layer as HQQ stores it; the dense one gives up its weight.

    Args:
        linear: Frozen or not; its dtype becomes that of the products.
        bits: 8 or 4.
        group_size: Numbers that share a scale; they must divide the weight.

    Returns:
        An `HQQLinear` in the same mode.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear.requires_grad_(False)  # HQQ copies a trainable bias as a tensor with a history, which cannot be copied again
    weight = linear.weight
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    made: nn.Module = HQQLinear(linear, config, compute_dtype=weight.dtype, device=str(weight.device))
    return made.train(linear.training)


def _stored(module: Any, _: str) -> Stored:
    return module.W_q, module.meta


def _read(module: Any, stored: Stored) -> Tensor:
    packed, facts = stored
    if _has_packed_scales(facts):
        return module.dequantize().float()  # an old form, which only the module itself can read
    from hqq.core.quantize import Quantizer

    return Quantizer.dequantize(packed, {**facts, "compute_dtype": torch.float32}).float()


def _write(module: Any, _: Stored, canonical: Tensor) -> Stored:
    settings = copy.deepcopy(module.quant_config)
    whole = {**settings, "offload_meta": module.offload_meta}
    other = type(module)(None, whole, compute_dtype=module.compute_dtype, device=module.device)
    other.quantize(canonical.to(device=module.W_q.device), **settings)
    return other.W_q, other.meta


def _place(module: Any, _: str, stored: Stored) -> None:
    module._parameters[PARAMETER], module.meta = stored


def _clone(module: nn.Module, parameter: str, stored: Stored) -> nn.Module:
    clone = clone_with(module, {})
    _place(clone, parameter, stored)
    return clone


def _device(module: Any, _: str) -> torch.device:
    return module.W_q.device


def _tensors(stored: Stored) -> tuple[Tensor, ...]:
    packed, facts = stored
    return (packed, *(fact for fact in facts.values() if isinstance(fact, Tensor)))


def _values(stored: Stored, places: Tensor) -> tuple[Tensor, Tensor]:
    """(number − zero) × scale; of 4 bits, the numbers of the first half of the groups lie in the upper halves.

    What HQQ optimises is not the largest error; a number lies within a step all the same.
    """
    packed, facts = stored
    bits, group = facts["nbits"], facts["group_size"]
    if _has_packed_scales(facts) or facts["axis"] != 1 or bits not in (4, 8) or facts["view_as_float"]:
        empty = torch.zeros(places.shape)
        return empty, torch.full_like(empty, torch.inf)
    places = places.to(packed.device)
    groups, within = places // group, places % group
    if bits == 4:
        half = packed.shape[0]
        pairs = packed[groups % half, within]
        numbers = torch.where(groups < half, pairs >> 4, pairs & 0xF).float()
    else:
        numbers = packed[groups, within].float()
    steps = facts["scale"].float().reshape(-1)[groups]
    return (numbers - facts["zero"].float().reshape(-1)[groups]) * steps, steps.abs()


def _has_packed_scales(facts: dict[str, Any]) -> bool:
    return bool(facts.get("quant_zero") or facts.get("quant_scale") or "zero_scale" in facts)


def _dense(module: Any, canonical: Tensor, _: torch.dtype) -> nn.Module:
    return linear_with(module, canonical, module.compute_dtype)


HQQ = WeightFormat(
    name="HQQ",
    types=("hqq.core.quantize.HQQLinear",),
    transposed=False,
    quantised=True,
    stored=_stored,
    read=_read,
    write=_write,
    place=_place,
    clone=_clone,
    device=_device,
    tensors=_tensors,
    dense=_dense,
    values=_values,
)
