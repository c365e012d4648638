"""The door to torchao: a weight is a tensor of its own class, which multiplies itself out.

Read: whatever torchao can dequantise. Written: int8 with a scale per row, the one kind whose training torchao supports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.quantization.weight_format import WeightFormat, linear_with
from lorakit.errors import MergeError

_INT8 = "Int8Tensor"


def int8_config() -> Any:
    """How torchao is told to store weights in 8 bits with a scale per row, and to leave activations as they are."""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_linear(linear: nn.Linear) -> nn.Module:
    """A dense layer whose weight is stored in 8 bits.

    Args:
        linear: It keeps its own weight.

    Returns:
        An `nn.Linear` in the same mode.
    """
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = linear.weight.shape
    made.weight = _quantised(linear.weight.detach())
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made.train(linear.training)


def _stored(module: nn.Module, parameter: str) -> Tensor:
    return module._parameters[parameter]  # type: ignore[return-value]


def _read(_: nn.Module, weight: Any) -> Tensor:
    if type(weight).__name__ == _INT8:
        return weight.dequantize(torch.float32)
    try:
        return weight.dequantize().float()
    except NotImplementedError as cause:
        raise MergeError(
            f"torchao cannot multiply out a {type(weight).__name__}, so nothing that needs the weight itself (merging, "
            "variants that read it) can be done on it. Plain LoRA works."
        ) from cause


def _write(_: nn.Module, like: Any, canonical: Tensor) -> Tensor:
    if type(like).__name__ != _INT8 or like.act_quant_kwargs is not None or like.block_size[0] != 1:
        raise MergeError(
            f"A {type(like).__name__} of torchao with these settings cannot be written; only int8 weights with a scale "
            "per row can. Merge with dense=True."
        )
    return _quantised(canonical.to(device=like.device, dtype=like.dtype))


def _quantised(weight: Tensor) -> Tensor:
    """A weight (out, in) as torchao's int8 tensor."""
    from torchao.quantization import quantize_

    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, int8_config())
    return holder.weight


def _place(module: nn.Module, parameter: str, weight: Any) -> None:
    module._parameters[parameter] = weight


def _clone(module: nn.Module, parameter: str, weight: Tensor) -> nn.Module:
    return clone_with(module, {parameter: weight})


def _dense(module: Any, canonical: Tensor, _: torch.dtype) -> nn.Module:
    return linear_with(module, canonical, module.weight.dtype)


def _device(module: nn.Module, parameter: str) -> torch.device:
    return module._parameters[parameter].device  # type: ignore[union-attr]


def _tensors(weight: Any) -> tuple[Tensor, ...]:
    names, _ = weight.__tensor_flatten__()
    return tuple(getattr(weight, name) for name in names)


def _values(weight: Any, places: Tensor) -> tuple[Tensor, Tensor]:
    if type(weight).__name__ != _INT8:
        numbers = _read(nn.Module(), weight).reshape(-1)[places.to(weight.device)]
        return numbers, torch.full_like(numbers, torch.inf)
    places = places.to(weight.device)
    steps = weight.scale.float().reshape(-1)[places // weight.shape[1]]
    return weight.qdata.reshape(-1)[places].float() * steps, steps


TORCHAO = WeightFormat(
    name="torchao",
    types=("torchao.utils.TorchAOBaseTensor",),
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
