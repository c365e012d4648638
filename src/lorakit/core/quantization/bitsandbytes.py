"""Weights quantized by bitsandbytes, to 4 bits (nf4, fp4) or 8 bits (one scale per row).

A stored 4-bit weight is the parameter itself, which carries its `quant_state`. A stored 8-bit weight is the parameter
together with the values and scales, because a `Linear8bitLt` moves them between its parameter and its `state`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.core.quantization.weight_format import M, Packed, S, WeightFormat, exact_values
from lorakit.errors import MergeError, ModelError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

_ROWS = 32
"""Number of rows that bitsandbytes interleaves when it repacks a 4-bit weight for a CPU."""

_REPACKS = "support_avx512bf16_for_cpu"
"""The flag that lets a `Linear4bit` repack its weight; the layer sets the flag according to the processor."""

_HALF_STEP = {"nf4": 0.153, "fp4": 0.18}
"""Bounds on the rounding error: half of the widest gap between adjacent code values in [−1, 1]. The bound for fp4 is
slightly larger, because fp4 does not round at the exact midpoints.
"""

_UNQUANTIZED = "This {bits}-bit layer has not been quantized yet. Move the model to its device first."


@dataclass(frozen=True)
class EightBit(Packed):
    """An 8-bit weight.

    Attributes:
        values: Weight values (out, in), in int8, or in floating point before quantization.
        scales: Largest magnitude in each row, (out,), in fp32; None before quantization.
    """

    parameter: Int8Params
    values: Tensor
    scales: Tensor | None


class _Format(WeightFormat[M, S]):
    """Base class of the 4-bit and 8-bit formats.

    Attributes:
        mark: Attribute that only parameters of the format have.
    """

    mark = "quant_state"

    def check(self, module: M, path: str) -> None:
        """Raise a ModelError if a weight was not quantized."""
        if not hasattr(module.weight, self.mark):
            text = f"{path}: the files contain dense weights; remove quantization_config, and pass --quantization."
            raise ModelError(text, what="bitsandbytes", where=path, field="quantization_config")


class FourBitFormat(_Format["Linear4bit", "Params4bit"]):
    """Format of a parameter that holds 4-bit codes and carries a `quant_state`."""

    def stored(self, module: Linear4bit, parameter: str) -> Params4bit:
        """Return the parameter itself."""
        return module.weight

    def read(self, module: Linear4bit, stored: Params4bit) -> Tensor:
        """Return the dequantized weight, (out, in), in fp32, regardless of the compute dtype."""
        import bitsandbytes.functional as package

        if stored.quant_state is None:  # quantized when first moved to a device
            return stored.detach().float()
        plain = _plain(stored)
        state = copy.copy(plain.quant_state)
        state.dtype = torch.float32
        return package.dequantize_4bit(plain.data, state)

    def write(self, module: Linear4bit, like: Params4bit, canonical: Tensor) -> Params4bit:
        """Quantize a weight (out, in) with the settings of a stored weight; a MergeError if that is not quantized."""
        import bitsandbytes.functional as package

        state = like.quant_state
        if state is None:
            raise MergeError(_UNQUANTIZED.format(bits=4), what="4-bit")
        packed, new_state = package.quantize_4bit(
            canonical.to(like.device, torch.float32).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=bool(state.nested or getattr(state, "original_nested", False)),
            quant_type=state.quant_type,
            quant_storage=like.quant_storage,
        )
        new_state.dtype = state.dtype
        return _parameter(like, packed, new_state)

    def put_stored(self, module: Linear4bit, parameter: str, stored: Params4bit) -> None:
        """Set the parameter of a layer to a stored weight."""
        module._parameters["weight"] = stored
        module.quant_state = stored.quant_state

    def tensors(self, stored: Params4bit) -> tuple[Tensor, ...]:
        """Return the packed codes, the scales and the decoding tables, as tensors of any shape."""
        state = stored.quant_state
        if state is None:
            return (stored.data,)
        inner = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        return (stored.data, state.absmax, state.code, *inner)

    def values(self, stored: Params4bit, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,), decoded value · scale of the block, and bounds on their errors (n,).

        Each byte holds two codes, with the earlier code in the upper four bits.
        """
        if stored.quant_state is None:
            return exact_values(stored.data, positions)
        plain = _plain(stored)
        state, packed = plain.quant_state, plain.data.view(torch.uint8).reshape(-1)
        positions = positions.to(packed.device)
        pairs = packed[positions // 2]
        codes = torch.where(positions % 2 == 0, pairs >> 4, pairs & 0xF).long()
        blocks = positions // state.blocksize
        if state.nested:
            outer = state.state2
            scales = outer.code[state.absmax[blocks].long()] * outer.absmax[blocks // outer.blocksize] + state.offset
            gap = outer.code.sort().values.diff().max() / 2  # the error from storing a scale in one byte
            slack = gap * outer.absmax[blocks // outer.blocksize]
        else:
            scales, slack = state.absmax[blocks].float(), 0.0
        return state.code[codes] * scales, _HALF_STEP[state.quant_type] * scales.abs() + slack

    def dense(self, module: Linear4bit, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
        """Return a plain module with a weight (out, in) in the compute dtype."""
        state = module.weight.quant_state
        fallback = canonical.dtype if state is None else state.dtype
        return super().dense(module, canonical, module.compute_dtype or fallback)

    def disable_repacking(self, module: Linear4bit) -> bool:
        """Keep a 4-bit layer from repacking its weight, and unpack a repacked weight; a ModelError if it was not
        quantized.

        On processors with AVX512-BF16, `Linear4bit` repacks its weight in the first forward pass in eval mode. That
        rounds the scales to bf16 and blocks all later gradients, even in training mode; it fails if the width is not a
        multiple of the block size.
        """
        if not getattr(module, _REPACKS, False):
            return False
        self.check(module, type(module).__name__)
        setattr(module, _REPACKS, False)
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            self.put_stored(module, "weight", _unpacked(module.weight))
        return True

    def allow_repacking(self, module: Linear4bit) -> None:
        """Undo `disable_repacking`."""
        setattr(module, _REPACKS, True)


class EightBitFormat(_Format["Linear8bitLt", EightBit]):
    """Format of a parameter that holds int8 values with one scale per row."""

    mark = "CB"

    def stored(self, module: Linear8bitLt, parameter: str) -> EightBit:
        """Return the parameter with its values and scales."""
        if module.weight.CB is not None:  # move the scales to the module's state, as the first forward pass would
            module.init_8bit_state()
        return EightBit(module.weight, module.weight.data, module.state.SCB)

    def read(self, module: Linear8bitLt, stored: EightBit) -> Tensor:
        """Return the dequantized weight, (out, in), in fp32."""
        if stored.scales is None:
            return stored.values.detach().float()
        return stored.values.float() * (stored.scales.float() / 127).unsqueeze(1)

    def write(self, module: Linear8bitLt, like: EightBit, canonical: Tensor) -> EightBit:
        """Quantize a weight (out, in); a MergeError if the stored weight has not been quantized yet."""
        import bitsandbytes as package

        if like.scales is None:
            raise MergeError(_UNQUANTIZED.format(bits=8), what="8-bit")
        values, scales, _outliers = package.functional.int8_vectorwise_quant(
            canonical.to(like.values.device, torch.float16)
        )
        parameter = package.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
        return EightBit(parameter, values, scales)

    def put_stored(self, module: Linear8bitLt, parameter: str, stored: EightBit) -> None:
        """Write a stored weight to a layer's parameter and state."""
        module._parameters["weight"] = stored.parameter
        state = copy.copy(module.state)
        state.CB, state.SCB = stored.values, stored.scales
        module.state = state

    def tensors(self, stored: EightBit) -> tuple[Tensor, ...]:
        """Return the values (out, in) and the scales (out,)."""
        return (stored.values,) if stored.scales is None else (stored.values, stored.scales)

    def values(self, stored: EightBit, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight elements (n,) and bounds on their errors (n,): one quantization step each."""
        if stored.scales is None:
            return exact_values(stored.values, positions)
        columns = stored.values.shape[1]
        positions = positions.to(stored.values.device)
        steps = stored.scales.float()[positions // columns] / 127
        return stored.values.reshape(-1)[positions].float() * steps, steps


def _parameter(like: Params4bit, packed: Tensor, state: QuantState) -> Params4bit:
    import bitsandbytes as package

    return package.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=like.compress_statistics,
        quant_type=state.quant_type,
        quant_storage=like.quant_storage,
        module=like.module,
        bnb_quantized=True,
    )


def _plain(weight: Params4bit) -> Params4bit:
    return _unpacked(weight) if getattr(weight.quant_state, "packing_format_for_cpu", False) else weight


def _unpacked(weight: Params4bit) -> Params4bit:
    """Return the plain form of a weight that was repacked for a CPU, with bitwise identical values.

    The repacked form interleaves rows in groups of 32 and stores the scales as (in/block, out) in bf16. They are
    converted to fp32; the inverse conversion in bitsandbytes would quantize them again.
    """
    state = weight.quant_state
    rows, columns = state.shape
    packed = weight.data.reshape(-1, _ROWS)
    codes = torch.cat([packed & 0xF, packed >> 4], dim=1).reshape(rows // _ROWS, columns // 2, _ROWS, 2)
    flat = codes.transpose(1, 2).reshape(-1)  # codes in row-major order
    plain = copy.copy(state)
    plain.absmax = state.absmax.T.contiguous().float().reshape(-1)
    plain.nested, plain.offset, plain.state2 = False, None, None
    plain.packing_format_for_cpu = False
    plain.dtype = state.original_dtype
    repacked = ((flat[::2] << 4) | flat[1::2]).to(torch.uint8).reshape(state.original_qshape)
    return _parameter(weight, repacked.view(weight.quant_storage), plain)


FOUR_BIT = FourBitFormat("bitsandbytes 4-bit", ("bitsandbytes.nn.modules.Linear4bit",))
EIGHT_BIT = EightBitFormat("bitsandbytes 8-bit", ("bitsandbytes.nn.modules.Linear8bitLt",))
