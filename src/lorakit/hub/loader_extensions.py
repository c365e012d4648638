"""Extensions of transformers' loader: quantizers that keep weights packed, and rules that join tensors.

The quantizers of transformers need packages or kernels that many machines lack, or dequantize all weights while loading
them. These replace linear layers by those of `lorakit.core.quantization`, which dequantize one weight at a time; the
names, shapes and dtypes come from the headers of the files. They are registered under separate names, so other callers
of `from_pretrained` are not affected.

Import this module inside functions only, because it imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakit.core import AwqLinear, CompressedLinear, GptqLinear, PackedLinear, packed_linear
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import AdapterFileError, ModelError
from lorakit.hub.model_config import stored_tensors
from lorakit.hub.quantization_keys import check_keys, groups_of, unsupported

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
        raise unsupported("compressed-tensors", "config_groups", len(blocks), "one layout of weights")
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
        raise unsupported(str(values["quant_method"]), name, value, ", ".join(map(str, allowed)))
    return value if isinstance(value, int) else 0


def replace_linears(model: PreTrainedModel, files: Sequence[Path], values: JsonObject) -> None:
    """Replace the linear layers of a model on the meta device whose weights are packed in its safetensors files.

    Raises:
        ModelError: lorakit does not support the layout, the files have no packed layer, a layer lacks a tensor, or the
            model has no linear layer with the name of a packed one.
    """
    kind = packed_kind(values)
    layers = _packed_layers(model, files, kind.module)
    if not layers:
        text = (
            f"the config says that the weights are quantized ({values['quant_method']}), but the files have no packed "
            "weights. Use undamaged files, or remove quantization_config from the config."
        )
        raise ModelError(text, what=values["quant_method"], field="quantization_config")
    for path, parts in layers.items():
        optional = kind.module.OPTIONAL - kind.needed
        missing = [name for name in kind.module.PARTS if name not in parts and name not in optional]
        if missing:
            text = (
                f"{path}.{missing[0]} is missing from the files, so its weight cannot be dequantized. Download the "
                "model again."
            )
            raise ModelError(text, what=missing[0], where=path, field=missing[0])
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = None
        if type(linear) is not nn.Linear:
            text = (
                f"{path} has packed weights in the files, but the model has no linear layer with this name "
                f"({'none' if linear is None else type(linear).__name__}); only linear layers can be packed. Use the "
                "unquantized model."
            )
            raise ModelError(text, what=type(linear).__name__, where=path)
        model.set_submodule(path, packed_linear(kind.module, linear, parts, kind.settings))


def _packed_layers(
    model: PreTrainedModel, files: Sequence[Path], module: type[PackedLinear]
) -> dict[str, dict[str, Tensor]]:
    """Return the packed tensors, on the meta device, of each linear layer: path in the model -> name -> tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, (dtype, shape) in stored_tensors(files).items():
        path, _, leaf = name.rpartition(".")
        if leaf in module.PARTS:
            tensor = torch.empty(shape, dtype=DTYPES.get(dtype, torch.float32), device="meta")
            layers.setdefault(path, {})[leaf] = tensor
    renamings = [rule for rule in rules_of(model) if is_renaming(rule)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    return {
        rename_source_key(f"{path}.weight", renamings, [], prefix, expected)[0].removesuffix(".weight"): parts
        for path, parts in layers.items()
        if set(parts) - {"weight"} or parts["weight"].dtype in CODES
    }


PREFIX = "lorakit-"
"""Prefix of the names under which the quantizers are registered."""

_EXPERTS = (".gate_up_proj", ".up_proj", ".down_proj")
"""Endings of the names of the parameters of fused experts."""


class PackedConfig(QuantizationConfigMixin):
    """The quantization config of files, with all of its values and the method as registered with transformers."""

    def __init__(self, quant_method: str, **values: JsonValue) -> None:
        self.quant_method = quant_method
        self.values = values


class PackedQuantizer(HfQuantizer):
    """Loads the packed tensors of linear layers into modules of `lorakit.core.quantization`."""

    requires_calibration = True
    is_trainable = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] = (), **kwargs: Any
    ) -> None:
        config: PackedConfig = self.quantization_config
        method = config.quant_method.removeprefix(PREFIX)
        replace_linears(model, [Path(file) for file in checkpoint_files], {**config.values, "quant_method": method})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Give the model the quantization config of its files, so that any program can load it once it is saved."""
        config: PackedConfig = self.quantization_config
        config.quant_method = model.quantization_method = config.quant_method.removeprefix(PREFIX)
        model.config.quantization_config = {**config.values, "quant_method": config.quant_method}

    def is_serializable(self) -> bool:
        """Return True: the packed tensors are saved as they were loaded."""
        return True


class Fp8Quantizer(FineGrainedFP8HfQuantizer):
    """Loads fp8 weights with block scales without dequantizing them; a model with fused experts is dequantized."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every device: `lorakit.core.quantization.fp8` provides a forward pass that needs no kernels."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if any(name.endswith(_EXPERTS) for name, _ in model.named_parameters()):
            self.quantization_config.dequantize = True
        super()._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Record the method of the files in the config, so that any program can load the model once it is saved."""
        self.quantization_config.quant_method = "fp8"
        if not self.quantization_config.dequantize:
            model.quantization_method = "fp8"
        return super()._process_model_after_weight_loading(model, **kwargs)


QUANTIZERS: dict[str, tuple[type[QuantizationConfigMixin], type[HfQuantizer]]] = {
    "fp8": (FineGrainedFP8Config, Fp8Quantizer),
    "gptq": (PackedConfig, PackedQuantizer),
    "awq": (PackedConfig, PackedQuantizer),
    "compressed-tensors": (PackedConfig, PackedQuantizer),
}
"""Quantization method of the files -> the classes of its config and its quantizer."""


def kept_packed(values: JsonObject) -> JsonObject:
    """Return a quantization config with which `from_pretrained` keeps weights of a method in `QUANTIZERS` packed.

    Raises:
        ModelError: lorakit does not support the layout of the packed weights.
    """
    method = str(values["quant_method"])
    if method != "fp8":
        packed_kind(values)
    name, (config, quantizer) = PREFIX + method, QUANTIZERS[method]
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(name)(quantizer)
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(config)
    return {**values, "quant_method": name}


Join = Callable[[Sequence[Sequence[Tensor]]], Tensor]
"""Function from the tensors of each source pattern, in natural order of their names, to one tensor."""

Rule: TypeAlias = WeightRenaming | WeightConverter
"""One rule of the loader."""

SCOPE = ("scope_prefix", "base_model_prefix")
"""Attributes that restrict a rule to a part of the model; early releases of transformers 5 lack them."""


class JoinTensors(ConversionOps):
    """An operation that joins all tensors of a rule in one call of `join`."""

    def __init__(self, join: Join) -> None:
        self.join = join

    def convert(
        self, input_dict: Mapping[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        """Return the joined tensor, keyed by the rule's only target pattern.

        The tensors (…) of each source pattern come in natural order of their names.

        Raises:
            AdapterFileError: The file has no tensors for a pattern.
        """
        missing = next((pattern for pattern in source_patterns if pattern not in input_dict), None)
        if missing is not None:
            text = f"The file has no tensors {missing}, which are a part of {target_patterns[0]}."
            raise AdapterFileError(text, what=missing)
        return {target_patterns[0]: self.join([input_dict[pattern] for pattern in source_patterns])}


def renaming(source: str, target: str) -> WeightRenaming:
    """Return a rule that replaces a pattern in tensor names."""
    return WeightRenaming(source_patterns=source, target_patterns=target)


def joining(sources: Sequence[str], target: str, join: Join, like: Rule) -> Rule:
    """Return a rule, with the scope of `like`, that joins the tensors whose names match any of several patterns."""
    rule = WeightConverter(source_patterns=list(sources), target_patterns=target, operations=[JoinTensors(join)])
    for name in SCOPE:
        if hasattr(like, name):
            setattr(rule, name, getattr(like, name))
    return rule


def is_renaming(rule: Rule) -> bool:
    """Return whether a rule only renames tensors."""
    return isinstance(rule, WeightRenaming)


def rules_of(model: nn.Module) -> list[Rule]:
    """Return the rules that transformers applies to the files of a model; models of others have none."""
    rules: list[Rule] = get_model_conversion_mapping(model)
    return rules
