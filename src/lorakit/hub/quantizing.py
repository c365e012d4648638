"""Quantize a base while transformers loads it or, for formats that transformers does not support, after loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorakit.caches import versions
from lorakit.durable import JsonObject
from lorakit.errors import ConfigError, ModelError, require_packages
from lorakit.hub.quantization_keys import check_keys
from lorakit.hub.shapes import quantization_values, shape_of_module
from lorakit.hub.sources import ModelSource
from lorakit.plan.quantized import BLOCK, Quantization, quantized_sites
from lorakit.tables import format_percent

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


_NEEDS = {
    "bitsandbytes": ("quant", "bitsandbytes", "accelerate"),
    "torchao": ("quant", "torchao", "accelerate"),
    "hqq": ("hqq", "hqq"),
}
"""Quantization package -> the lorakit extra that installs it, followed by all required packages."""


def quantization_metadata(wanted: Quantization) -> dict[str, Any]:
    """Return "method", "double_quantization" and "package" (name and version), which determine quantized weights."""
    package = wanted.storage.package
    version = f"{package} {versions((package,))[package] or 'not installed'}"
    return {"method": wanted.name, "double_quantization": wanted.double, "package": version}


def require_quantizer(wanted: Quantization) -> None:
    """Raise a MissingExtra error if the packages that a quantization needs are not installed."""
    extra, *needed = _NEEDS[wanted.storage.package]
    require_packages(f"quantization {wanted.name!r}", extra, needed)


def loading_options(
    wanted: Quantization, dtype: torch.dtype, device: str | torch.device, unquantized: Sequence[str] = ()
) -> dict[str, Any]:
    """Return options that make `from_pretrained` quantize each weight as it is read.

    They are empty if transformers does not support the format, because `finish_loading` then quantizes the model.
    `unquantized` are paths of modules to leave out; if empty, transformers leaves out the output head.
    """
    import transformers

    skipped = list(unquantized) or None
    if wanted.storage.package == "bitsandbytes":
        if wanted.name == "int8":
            config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        else:
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=wanted.name,
                bnb_4bit_use_double_quant=wanted.double,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=skipped,
            )
    elif wanted.storage.package == "torchao":
        from lorakit.core.quantization.torchao import int8_config

        config = transformers.TorchAoConfig(int8_config(), modules_to_not_convert=skipped)
    else:
        return {}
    return {"quantization_config": config, "device_map": {"": device}}


def finish_loading(
    model: nn.Module, wanted: Quantization | None, source: ModelSource, unquantized: Sequence[str] = ()
) -> None:
    """Quantize a loaded model if transformers could not, block weight repacking, and check dequantization.

    Raises:
        ModelError: A module cannot be quantized, or the package does not dequantize it correctly on this device.
    """
    if wanted is not None and wanted.storage.package == "hqq":
        _quantize_with_hqq(model, wanted, source, unquantized)
    from lorakit.core.model.base_view import check_quantized_weights, disable_base_repacking, wrong_dequantization

    check_quantized_weights(model)
    disable_base_repacking(model)
    wrong = wrong_dequantization(model)
    if wrong is not None:
        raise source.error(
            f"the quantization package does not dequantize {wrong[0]} correctly on this device: the error is up to "
            f"{format_percent(wrong[1], 0)} of the largest value (a known bitsandbytes issue on CPUs for widths "
            "that are multiples of 16 but not of 64). Use another quantization or another device."
        )


def check_quantized_once(config: PreTrainedConfig, wanted: Quantization | None, source: ModelSource) -> bool:
    """Return whether a model's files are quantized; False for a GGUF file, whose weights are dequantized.

    Raises:
        ConfigError: The files are quantized or are a GGUF file, and a quantization was requested.
    """
    stored = getattr(config, "quantization_config", None)
    if source.header is not None and wanted is not None:
        text = (
            f"{source.given}: the weights of a GGUF file are dequantized and cannot be quantized again; omit "
            f"quantization {wanted.name!r}, or pass the directory of the original model."
        )
        raise ConfigError(text, what=wanted.name, where=source.given, field="quantization")
    if stored is not None and wanted is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", "unknown")
        raise ConfigError(
            f"{source.given}: the files are already quantized ({getattr(method, 'value', method)}); omit "
            f"quantization {wanted.name!r}.",
            where=source.given,
        )
    return stored is not None


PACKED_METHODS = frozenset({"fp8", "gptq", "awq", "compressed-tensors"})
"""Quantization methods of files whose weights lorakit keeps packed; see `lorakit.hub.loader_extensions`."""


def options_for_files(
    config: PreTrainedConfig, wanted: Quantization | None, source: ModelSource, device: str | torch.device
) -> dict[str, Any]:
    """Return options with which `from_pretrained` loads quantized files; empty if the files are not quantized.

    Weights in one of `PACKED_METHODS` stay packed, for which `config` is changed. Weights in MXFP4 are dequantized,
    because the kernels that transformers has for them cannot train adapters.

    Raises:
        ConfigError: The files are quantized, and a quantization was requested.
        ModelError: The method or the layout of the files is not supported, or a key may change what they mean.
    """
    if not check_quantized_once(config, wanted, source):
        return {}
    options: dict[str, Any] = {"device_map": {"": device}}
    values = quantization_values(config)
    _check_known_method(values, source)
    check_keys(values)
    method = values["quant_method"]
    if method == "mxfp4":
        import transformers

        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    elif method in PACKED_METHODS and not values.get("dequantize"):
        from lorakit.hub.loader_extensions import kept_packed

        config.quantization_config = kept_packed(values)
        options["config"] = config
    return options


def dequantize_files(model: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """Dequantize a model loaded from quantized files, also in its config; returns the number of replaced modules.

    Without a dtype, the weights get that of the other weights.

    Raises:
        MergeError: A weight cannot be read.
    """
    from lorakit.core import dequantize

    count = dequantize(model, dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and count:
        quantizer.remove_quantization_config(model)
    return count


def _check_known_method(values: JsonObject, source: ModelSource) -> None:
    """Check that the quantization method of a model's files is known, before any weights are read.

    Without this check, transformers would load the packed tensors of an unknown method as ordinary weights.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    method = values.get("quant_method")
    if method not in known:
        raise ModelError(
            f"{source.given}: the weights are quantized with the unknown method {method!r}. Use files with another "
            "quantization, or the unquantized model.",
            what=str(method),
            where=source.given,
            field="quant_method",
            allowed=sorted(name for name in known if not name.startswith("lorakit")),
        )


def quantization_of_files(config: PreTrainedConfig) -> Quantization | None:
    """Return the quantization in a model's config; None if there is none, or one that has no name in `STORAGES`."""
    facts: dict[str, Any] = quantization_values(config)
    method = facts.get("quant_method")
    if method == "bitsandbytes" and facts.get("load_in_8bit"):
        return Quantization("int8")
    if method == "bitsandbytes" and facts.get("bnb_4bit_quant_type") in ("nf4", "fp4"):
        return Quantization(facts["bnb_4bit_quant_type"], bool(facts.get("bnb_4bit_use_double_quant")))
    if method == "torchao" and "Int8WeightOnlyConfig" in str(facts.get("quant_type")):
        return Quantization("int8-torchao")
    return None


def _quantize_with_hqq(model: nn.Module, wanted: Quantization, source: ModelSource, unquantized: Sequence[str]) -> None:
    from lorakit.core.quantization.hqq import hqq_linear

    storage = wanted.storage
    shape = replace(shape_of_module(model, source.given, source.given), full_modules=tuple(unquantized))
    for site in quantized_sites(shape, storage):
        whole = BLOCK * 8 // storage.bits  # hqq packs two 4-bit groups, half a weight matrix apart, into the same bytes
        if site.weight_parameters % whole:
            raise source.error(
                f"{site.path} has {site.weight_parameters:,} values, not a multiple of {whole}, so hqq cannot quantize "
                "it. Use another quantization."
            )
        linear: Any = model.get_submodule(site.path)
        model.set_submodule(site.path, hqq_linear(linear, storage.bits, BLOCK))
    vars(model)["hqq_quantized"] = True  # libraries built on transformers check this attribute
