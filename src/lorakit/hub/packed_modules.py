"""Replace the linear layers of a model without weights by layers for the packed tensors in its files.

The names, shapes and dtypes come from the headers of the files; the quantization config says only how to decode them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.core import AwqLinear, CompressedLinear, GptqLinear, PackedLinear, packed_linear
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import ModelError
from lorakit.hub.quantization_keys import check_keys, groups_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Name of a dtype in a safetensors file -> the dtype."""

CODES = frozenset({torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32})
"""Dtypes of quantized values."""

COMPRESSED_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
"""Layouts of compressed-tensors that store one value per byte."""


@dataclass(frozen=True)
class PackedKind:
    """Class and settings of packed layers, and the optional tensors without which they cannot be decoded."""

    module: type[PackedLinear]
    settings: Mapping[str, int | tuple[int, int] | None]
    needed: frozenset[str] = frozenset()


def packed_kind(values: JsonObject) -> PackedKind:
    """Return how a "gptq", "awq" or "compressed-tensors" config says that linear layers are stored.

    Raises:
        ModelError: lorakit does not support one of the values.
    """
    check_keys(values)
    return _KINDS[str(values["quant_method"])](values)


def _gptq(values: JsonObject) -> PackedKind:
    bits = _allowed(values, "bits", values.get("bits"), GptqLinear.BITS)
    layout = values.get("checkpoint_format") or values.get("format") or "gptq"
    _allowed(values, "checkpoint_format", layout, ("gptq", "gptq_v2"))
    is_ordered = values.get("desc_act") and values.get("group_size") != -1  # then groups are not consecutive
    needed = frozenset({"g_idx"}) if is_ordered else frozenset[str]()
    return PackedKind(GptqLinear, {"bits": bits, "offset": 1 if layout == "gptq" else 0}, needed)


def _awq(values: JsonObject) -> PackedKind:
    _allowed(values, "bits", values.get("bits", values.get("w_bit", 4)), AwqLinear.BITS)
    _allowed(values, "version", str(values.get("version") or values.get("format") or "gemm").lower(), ("gemm",))
    return PackedKind(AwqLinear, {})


def _compressed(values: JsonObject) -> PackedKind:
    blocks: set[tuple[int, int] | None] = set()
    symmetric = set[bool]()
    for _, group, weights in groups_of(values):
        if weights is None:
            continue
        symmetric.add(weights.get("symmetric") is not False)
        _allowed(values, "format", group.get("format") or values.get("format"), COMPRESSED_FORMATS)
        _allowed(values, "num_bits", weights.get("num_bits"), CompressedLinear.BITS)
        _allowed(values, "actorder", weights.get("actorder") or "none", ("none", "static", "weight"))
        size = weights.get("block_structure")
        is_block = weights.get("strategy") == "block" and isinstance(size, list) and len(size) == 2
        blocks.add((int(size[0]), int(size[1])) if is_block else None)  # type: ignore[index]
    if len(blocks) != 1:
        raise _unsupported("config_groups", len(blocks), ("one layout of weights",))
    needed = frozenset({"weight_zero_point"}) if symmetric == {False} else frozenset[str]()
    return PackedKind(CompressedLinear, {"block": blocks.pop()}, needed)


_KINDS: Mapping[str, Callable[[JsonObject], PackedKind]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


def _allowed(values: JsonObject, name: str, value: JsonValue, allowed: Sequence[int | str]) -> int:
    """Return a value of a quantization config as an integer (0 for a string), after checking that it is allowed."""
    if value not in allowed:
        raise _unsupported(f"{values['quant_method']} {name}", value, allowed)
    return value if isinstance(value, int) else 0


def _unsupported(name: str, value: JsonValue, allowed: Iterable[int | str]) -> ModelError:
    names = [str(one) for one in allowed]
    return ModelError(
        f"quantization_config: {name} is {value!r}, but lorakit reads only {', '.join(names)}. Use files with another "
        "quantization, or the unquantized model.",
        what=value,
        field=name.rpartition(" ")[2],
        allowed=names,
    )


def replace_linears(model: PreTrainedModel, files: Sequence[Path], values: JsonObject) -> None:
    """Replace the linear layers of a model on the meta device whose weights are packed in its safetensors files.

    Raises:
        ModelError: lorakit does not support the layout, the files have no packed layer, a layer lacks a tensor, or the
            model has no linear layer with the name of a packed one.
    """
    kind = packed_kind(values)
    layers = _packed_layers(model, files, kind.module)
    if not layers:
        raise ModelError(
            f"the config says that the weights are quantized ({values['quant_method']}), but the files have no packed "
            "weights. Use undamaged files, or remove quantization_config from the config.",
            what=values["quant_method"],
            field="quantization_config",
        )
    for path, parts in layers.items():
        optional = kind.module.OPTIONAL - kind.needed
        missing = [name for name in kind.module.PARTS if name not in parts and name not in optional]
        if missing:
            raise ModelError(
                f"{path}.{missing[0]} is missing from the files, so its weight cannot be dequantized. Download the "
                "model again.",
                what=missing[0],
                where=path,
                field=missing[0],
            )
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = None
        if type(linear) is not nn.Linear:
            raise ModelError(
                f"{path} has packed weights in the files, but the model has no linear layer with this name "
                f"({'none' if linear is None else type(linear).__name__}); only linear layers can be packed. Use the "
                "unquantized model.",
                what=type(linear).__name__,
                where=path,
            )
        model.set_submodule(path, packed_linear(kind.module, linear, parts, kind.settings))


def _packed_layers(
    model: PreTrainedModel, files: Sequence[Path], module: type[PackedLinear]
) -> dict[str, dict[str, Tensor]]:
    """Return the packed tensors, on the meta device, of each linear layer: path in the model -> name -> tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(files):
        path, _, leaf = name.rpartition(".")
        if leaf in module.PARTS:
            layers.setdefault(path, {})[leaf] = tensor
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    return {
        rename_source_key(f"{path}.weight", renamings, [], prefix, expected)[0].removesuffix(".weight"): parts
        for path, parts in layers.items()
        if set(parts) - {"weight"} or parts["weight"].dtype in CODES
    }


def _tensors(files: Sequence[Path]) -> Iterable[tuple[str, Tensor]]:
    """Yield the names of the tensors in safetensors files, and empty tensors with their shapes and dtypes."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype(), torch.float32)
                yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")
