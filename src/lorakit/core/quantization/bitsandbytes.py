"""The door to bitsandbytes: weights of 4 bits (nf4, fp4) and of 8 bits (a scale per row).

A stored 4-bit weight is the parameter itself, whose `quant_state` travels with it; a stored 8-bit weight is the
parameter with its numbers and scales, which the module moves about between parameter and state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.quantization.weight_format import WeightFormat, exact_values, linear_with
from lorakit.errors import MergeError
from lorakit.targets.layer_types import CONV1D

_ROWS = 32
"""Rows that bitsandbytes puts side by side when it repacks a 4-bit weight for a CPU."""

_STEADY = "support_avx512bf16_for_cpu"
"""The flag of a `Linear4bit` that lets it repack its weight. It makes the flag itself, for the processor at hand."""

_HALF_STEP = {"nf4": 0.153, "fp4": 0.18}
"""Half of the widest gap between two values of a code that runs from −1 to 1: no number was moved farther. fp4 does not
round at the very middle of its gaps."""


@dataclass(frozen=True)
class EightBit:
    """An 8-bit weight.

    Attributes:
        parameter: The module's `Int8Params`.
        numbers: (out, in), int8; floats where nothing has been quantised yet.
        scales: The largest magnitude of each row, (out,), fp32; None where nothing has been quantised yet.
    """

    parameter: Any
    numbers: Tensor
    scales: Tensor | None


def four_bit_linear(linear: nn.Linear, quant_type: str, double: bool) -> nn.Module:
    """A dense layer in 4 bits, held still; the dtype of its products is that of its weight.

    Args:
        linear: It keeps its own weight.
        quant_type: "nf4" or "fp4".
        double: Quantise the scales too.

    Returns:
        A `Linear4bit` in the same mode.
    """
    import bitsandbytes as package

    weight, bias = linear.weight.detach(), linear.bias
    rows, columns = weight.shape
    wanted: dict[str, Any] = {"compress_statistics": double, "quant_type": quant_type}
    made: Any = package.nn.Linear4bit(columns, rows, False, weight.dtype, **wanted, device="meta")
    fresh = package.nn.Params4bit(weight, requires_grad=False, **wanted, module=made)
    _put_four_bit(made, fresh.to(weight.device))
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    _hold(made)
    return made.train(linear.training)


def eight_bit_linear(linear: nn.Linear) -> nn.Module:
    """A dense layer in 8 bits.

    Args:
        linear: It keeps its own weight.

    Returns:
        A `Linear8bitLt` in the same mode.
    """
    import bitsandbytes as package

    weight, bias = linear.weight.detach(), linear.bias
    rows, columns = weight.shape
    made: Any = package.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    made.weight = package.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made.train(linear.training)


def _hold(module: Any) -> bool:
    """Keep a 4-bit layer from rewriting its own weight, and undo it where that has happened.

    On processors with AVX512-BF16, `Linear4bit` repacks its weight at the first forward in eval mode: scales are
    rounded to bf16, no gradient passes from then on, also not in training mode, and widths that are no multiple of the
    block fail. Held still, it has the same bits in every mode and on every processor.

    It is held by a flag of its own, which it makes for the processor at hand.
    """
    if not getattr(module, _STEADY, False):
        return False
    setattr(module, _STEADY, False)
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        _put_four_bit(module, _unpacked(module.weight))
    return True


def _let_go(module: nn.Module) -> None:
    setattr(module, _STEADY, True)


def _stored_four_bit(module: Any, _: str) -> Any:
    return module.weight


def _read_four_bit(_: nn.Module, weight: Any) -> Tensor:
    import bitsandbytes.functional as package

    if weight.quant_state is None:  # it is quantised when it is first moved to a device
        return weight.detach().float()
    plain = _plain(weight)
    return package.dequantize_4bit(plain.data, _in_fp32(plain.quant_state))


def _write_four_bit(_: nn.Module, like: Any, canonical: Tensor) -> Any:
    import bitsandbytes.functional as package

    state = like.quant_state
    if state is None:
        raise MergeError("A 4-bit layer has not been quantised yet, which moving the model to its device does first.")
    packed, made = package.quantize_4bit(
        canonical.to(like.device, torch.float32).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=bool(state.nested or getattr(state, "original_nested", False)),
        quant_type=state.quant_type,
        quant_storage=like.quant_storage,
    )
    made.dtype = state.dtype
    return _parameter(like, packed, made)


def _put_four_bit(module: Any, weight: Any) -> None:
    module._parameters["weight"] = weight
    module.quant_state = weight.quant_state


def _place_four_bit(module: nn.Module, _: str, weight: Any) -> None:
    _put_four_bit(module, weight)


def _clone_four_bit(module: nn.Module, _: str, weight: Any) -> nn.Module:
    clone = clone_with(module, {})
    _put_four_bit(clone, weight)
    return clone


def _tensors_four_bit(weight: Any) -> tuple[Tensor, ...]:
    state = weight.quant_state
    if state is None:
        return (weight.data,)
    inner = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
    return (weight.data, state.absmax, state.code, *inner)


def _values_four_bit(weight: Any, places: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers lie in a byte, the earlier in its upper half; a value of the code times the scale of its block."""
    if weight.quant_state is None:
        return exact_values(weight.data, places)
    plain = _plain(weight)
    state, packed = plain.quant_state, plain.data.view(torch.uint8).reshape(-1)
    places = places.to(packed.device)
    pairs = packed[places // 2]
    codes = torch.where(places % 2 == 0, pairs >> 4, pairs & 0xF).long()
    blocks = places // state.blocksize
    if state.nested:
        outer = state.state2
        scales = outer.code[state.absmax[blocks].long()] * outer.absmax[blocks // outer.blocksize] + state.offset
        gap = outer.code.sort().values.diff().max() / 2  # a scale of one byte is itself so far off
        slack = gap * outer.absmax[blocks // outer.blocksize]
    else:
        scales, slack = state.absmax[blocks].float(), 0.0
    return state.code[codes] * scales, _HALF_STEP[state.quant_type] * scales.abs() + slack


def _stored_eight_bit(module: Any, _: str) -> EightBit:
    if module.weight.CB is not None:  # scales move from the parameter to the state, as at the first forward
        module.init_8bit_state()
    return EightBit(module.weight, module.weight.data, module.state.SCB)


def _read_eight_bit(_: nn.Module, stored: EightBit) -> Tensor:
    if stored.scales is None:
        return stored.numbers.detach().float()
    return stored.numbers.float() * (stored.scales.float() / 127).unsqueeze(1)


def _write_eight_bit(_: nn.Module, like: EightBit, canonical: Tensor) -> EightBit:
    import bitsandbytes as package

    if like.scales is None:
        raise MergeError("An 8-bit layer has not been quantised yet, which moving the model to its device does first.")
    numbers, scales, _outliers = package.functional.int8_vectorwise_quant(
        canonical.to(like.numbers.device, torch.float16)
    )
    made = package.nn.Int8Params(numbers, requires_grad=False, has_fp16_weights=False)
    return EightBit(made, numbers, scales)


def _place_eight_bit(module: Any, _: str, stored: EightBit) -> None:
    module._parameters["weight"] = stored.parameter
    state = copy.copy(module.state)
    state.CB, state.SCB = stored.numbers, stored.scales
    module.state = state


def _clone_eight_bit(module: nn.Module, parameter: str, stored: EightBit) -> nn.Module:
    clone = clone_with(module, {})
    _place_eight_bit(clone, parameter, stored)
    return clone


def _tensors_eight_bit(stored: EightBit) -> tuple[Tensor, ...]:
    return (stored.numbers,) if stored.scales is None else (stored.numbers, stored.scales)


def _values_eight_bit(stored: EightBit, places: Tensor) -> tuple[Tensor, Tensor]:
    if stored.scales is None:
        return exact_values(stored.numbers, places)
    columns = stored.numbers.shape[1]
    places = places.to(stored.numbers.device)
    steps = stored.scales.float()[places // columns] / 127
    return stored.numbers.reshape(-1)[places].float() * steps, steps


def _dense_four_bit(module: Any, canonical: Tensor, _: torch.dtype) -> nn.Module:
    state = module.weight.quant_state
    return _dense(module, canonical, module.compute_dtype or (canonical.dtype if state is None else state.dtype))


def _dense(module: Any, canonical: Tensor, dtype: torch.dtype) -> nn.Module:
    """A plain module in its place; of the class it had before, where that stores weights as (in, out)."""
    before = getattr(module, "source_cls", nn.Linear)
    if before.__name__ != CONV1D:
        return linear_with(module, canonical, dtype)
    made: Any = before(*canonical.shape).to(dtype).train(module.training)
    made.weight = nn.Parameter(canonical.T.to(dtype).contiguous(), requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return made


def _device(module: Any, _: str) -> torch.device:
    return module.weight.device


def _in_fp32(state: Any) -> Any:
    """The same quantisation, whose numbers come out in fp32 whatever the dtype of the products is."""
    made = copy.copy(state)
    made.dtype = torch.float32
    return made


def _parameter(like: Any, packed: Tensor, state: Any) -> Any:
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


def _plain(weight: Any) -> Any:
    return _unpacked(weight) if getattr(weight.quant_state, "packing_format_for_cpu", False) else weight


def _unpacked(weight: Any) -> Any:
    """The plain form of a weight that was repacked for a CPU: the same numbers to the bit.

    There, 32 rows lie side by side, and the scales are (in/block, out) in bf16. The package's own inverse quantises
    the scales anew, which changes them; here they become fp32, without double quantisation.
    """
    state = weight.quant_state
    rows, columns = state.shape
    packed = weight.data.reshape(-1, _ROWS)
    codes = torch.cat([packed & 0xF, packed >> 4], dim=1).reshape(rows // _ROWS, columns // 2, _ROWS, 2)
    flat = codes.transpose(1, 2).reshape(-1)  # number after number, row after row
    plain = copy.copy(state)
    plain.absmax = state.absmax.T.contiguous().float().reshape(-1)
    plain.nested, plain.offset, plain.state2 = False, None, None
    plain.packing_format_for_cpu = False
    plain.dtype = state.original_dtype
    bytes_again = ((flat[::2] << 4) | flat[1::2]).to(torch.uint8).reshape(state.original_qshape)
    return _parameter(weight, bytes_again.view(weight.quant_storage), plain)


FOUR_BIT = WeightFormat(
    name="bitsandbytes 4-bit",
    types=("bitsandbytes.nn.modules.Linear4bit",),
    transposed=False,
    quantised=True,
    stored=_stored_four_bit,
    read=_read_four_bit,
    write=_write_four_bit,
    place=_place_four_bit,
    clone=_clone_four_bit,
    device=_device,
    tensors=_tensors_four_bit,
    dense=_dense_four_bit,
    values=_values_four_bit,
    hold=_hold,
    let_go=_let_go,
)

EIGHT_BIT = WeightFormat(
    name="bitsandbytes 8-bit",
    types=("bitsandbytes.nn.modules.Linear8bitLt",),
    transposed=False,
    quantised=True,
    stored=_stored_eight_bit,
    read=_read_eight_bit,
    write=_write_eight_bit,
    place=_place_eight_bit,
    clone=_clone_eight_bit,
    device=_device,
    tensors=_tensors_eight_bit,
    dense=_dense,
    values=_values_eight_bit,
)
