"""Weights quantized by torchao, which stores them as tensor subclasses that dequantize themselves.

lorakit reads every format that torchao can dequantize. It writes only int8 with one scale per row, the only torchao
format that supports training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.core.quantization.weight_format import PlainFormat, linear_with
from lorakit.errors import MergeError

if TYPE_CHECKING:
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.utils import TorchAOBaseTensor

_INT8 = "Int8Tensor"


def int8_config() -> Int8WeightOnlyConfig:
    """Return torchao's config for int8 weight-only quantization with one scale per row."""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def quantized_weight(weight: Tensor) -> nn.Parameter:
    """Return a weight (out, in) as a torchao int8 tensor."""
    from torchao.quantization import quantize_

    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, int8_config())
    return holder.weight


class TorchaoFormat(PlainFormat):
    """Format of a parameter whose type is one of torchao's tensor subclasses."""

    quantized = True

    def stored(self, module: nn.Module, parameter: str) -> TorchAOBaseTensor:
        """Return the parameter (out, in) itself."""
        return module._parameters[parameter]

    def read(self, module: nn.Module, stored: TorchAOBaseTensor) -> Tensor:
        """Return the dequantized weight, (out, in), in fp32."""
        return _dequantized(stored)

    def write(self, module: nn.Module, like: TorchAOBaseTensor, canonical: Tensor) -> Tensor:
        """Quantize a weight (out, in) to int8; a MergeError if the stored weight is not int8 with one scale per row."""
        if type(like).__name__ != _INT8 or like.act_quant_kwargs is not None or like.block_size[0] != 1:
            text = f"lorakit writes only int8 with one scale per row, not {type(like).__name__}; merge with dense=True."
            raise MergeError(text, what=type(like).__name__)
        return quantized_weight(canonical.to(device=like.device, dtype=like.dtype))

    def put_stored(self, module: nn.Module, parameter: str, stored: TorchAOBaseTensor) -> None:
        """Set the module's parameter to a stored weight (out, in)."""
        module._parameters[parameter] = stored

    def dense(self, module: nn.Module, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
        """Return an nn.Linear with a weight (out, in) in the dtype of the quantized weight."""
        stored: Tensor = self.stored(module, "weight")
        return linear_with(module, canonical, stored.dtype)

    def tensors(self, stored: TorchAOBaseTensor) -> tuple[Tensor, ...]:
        """Return the tensors that make up a stored weight; they can have any shape."""
        names, _ = stored.__tensor_flatten__()
        return tuple(getattr(stored, name) for name in names)

    def values(self, stored: TorchAOBaseTensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,) and error bounds (n,): one quantization step for int8, otherwise infinity."""
        positions = positions.to(stored.device)
        if type(stored).__name__ != _INT8:
            values = _dequantized(stored).reshape(-1)[positions]
            return values, torch.full_like(values, torch.inf)
        steps = stored.scale.float().reshape(-1)[positions // stored.shape[1]]
        return stored.qdata.reshape(-1)[positions].float() * steps, steps


def _dequantized(stored: TorchAOBaseTensor) -> Tensor:
    if type(stored).__name__ == _INT8:
        return stored.dequantize(torch.float32)
    try:
        return stored.dequantize().float()
    except NotImplementedError as cause:
        text = f"torchao cannot dequantize a {type(stored).__name__}; plain LoRA works without merging."
        raise MergeError(text, what=type(stored).__name__) from cause


TORCHAO = TorchaoFormat("torchao", ("torchao.utils.TorchAOBaseTensor",))
