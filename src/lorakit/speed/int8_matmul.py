"""Int8 matmuls in `accelerate`: check the request, the model and the processor, quantize, and describe the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lorakit.choices import BASE_MATMULS, MATMUL_IN_DTYPE, MATMUL_IN_INT8
from lorakit.core import Int8Base, quantize_base
from lorakit.errors import ConfigError, ModelError
from lorakit.ops.int8 import why_no_int8_matmuls
from lorakit.speed.patching import is_replacement
from lorakit.tables import format_bytes

"""Values of `base_matmul`: matmuls in the dtype of the weights, or in int8."""


def check_not_accelerated(model: nn.Module) -> None:
    """Check that no part of a model is accelerated.

    Raises:
        ModelError: All or part of the model is already accelerated.
    """
    kind = type(model).__name__
    found = list[bool]()
    model.apply(lambda module: found.append(is_replacement(module)))
    if any(found):
        raise ModelError(f"{kind} is already accelerated; call undo() on the earlier result first", what=kind)


def int8_base(
    model: nn.Module, base_matmul: str, calibration: Iterable[Mapping[str, Tensor]] | None, keep: bool
) -> tuple[Int8Base | None, str]:
    """Quantize a base for int8 matmuls, if this is requested and the processor multiplies int8 fast and exactly.

    Returns the quantized base, or None, and the reason why it was not quantized although it was requested, or "".

    Raises:
        ConfigError: `base_matmul` is unknown, there is no calibration data, or the base is quantized or trained.
    """
    if base_matmul not in BASE_MATMULS:
        raise ConfigError.of("base_matmul", base_matmul, allowed=BASE_MATMULS)
    if base_matmul == MATMUL_IN_DTYPE:
        return None, ""
    check_not_accelerated(model)
    if calibration is None:
        text = (
            "base_matmul 'int8' needs calibration batches: pass calibration=[...], each with the arguments of the "
            "model, such as input_ids and attention_mask."
        )
        raise ConfigError(text, what=MATMUL_IN_INT8, field="calibration")
    why = why_no_int8_matmuls()
    return (None, why) if why else (quantize_base(model, calibration, keep=keep), "")


def describe_int8(base: Int8Base | None, why_not: str) -> list[str]:
    """Return the lines of a report about int8 matmuls; empty if they were not requested."""
    if base is None:
        return [f"base matmuls: in the dtype of the weights, not in int8 ({why_not})"] if why_not else []
    sizes = f"{format_bytes(base.bytes_before)} to {format_bytes(base.bytes_after)}"
    return [f"base matmuls: int8 in {len(base.paths)} modules, calibrated on {base.tokens} tokens; base from {sizes}"]
