"""Extensions of transformers' loader: quantizers that keep weights packed, and rules that join tensors.

The quantizers of transformers need packages or kernels that many machines lack, or dequantize all weights while loading
them. These create the modules of `lorakit.core.quantization`, which dequantize one weight at a time. They are
registered under separate names, so other callers of `from_pretrained` are not affected.

Import this module inside functions only, because it imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import AdapterFileError
from lorakit.hub.packed_modules import packed_kind, replace_linears

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
        self,
        input_dict: Mapping[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, Tensor]:
        """Return the joined tensor, keyed by the rule's only target pattern.

        The tensors (…) of each source pattern come in natural order of their names.

        Raises:
            AdapterFileError: The file has no tensors for a pattern.
        """
        missing = next((pattern for pattern in source_patterns if pattern not in input_dict), None)
        if missing is not None:
            raise AdapterFileError(
                f"The file has no tensors {missing}, which are a part of {target_patterns[0]}.", what=missing
            )
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
