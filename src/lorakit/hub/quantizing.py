"""Loading a base in fewer bits: through transformers where it can, else with the quantiser's own interface afterwards.

The words and which modules they take are `lorakit.plan.quantized`'s. What is stored how, once it is loaded, is the
business of `lorakit.core.quantization`.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError, MissingExtra, ModelError
from lorakit.hub.shapes import shape_of_module
from lorakit.hub.sources import ModelSource
from lorakit.plan.quantized import BLOCK, Quantization, quantized_sites
from lorakit.tables import format_percent

if TYPE_CHECKING:
    import torch
    from torch import nn


_NEEDS = {
    "bitsandbytes": ("quant", "bitsandbytes", "accelerate"),
    "torchao": ("quant", "torchao", "accelerate"),
    "hqq": ("hqq", "hqq"),
}
"""Package of a storage -> the extra of lorakit that brings it, and the packages that have to be there."""


def quantiser_facts(wanted: Quantization) -> dict[str, Any]:
    """What identifies a stored base, as plain JSON values: the same facts and files give the same bits.

    Args:
        wanted: How it is stored.

    Returns:
        "method", "double_quantization", and "package" with its version.
    """
    package = wanted.storage.package
    version = metadata.version(package) if importlib.util.find_spec(package) else "not installed"
    return {"method": wanted.name, "double_quantization": wanted.double, "package": f"{package} {version}"}


def require_quantiser(wanted: Quantization) -> None:
    """Refuse a quantisation whose packages are not installed.

    Raises:
        MissingExtra: The message holds the pip command.
    """
    extra, *needed = _NEEDS[wanted.storage.package]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"quantization {wanted.name!r} needs the package {' and '.join(missing)}: pip install 'lorakit[{extra}]'"
        )


def loading_options(wanted: Quantization, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """What `from_pretrained` has to be told, so that the weights are quantised one by one while they are read.

    Args:
        wanted: How to store.
        dtype: Of the products.
        device: Where the weights go.

    Returns:
        Keyword arguments; none where transformers cannot do it, and `quantise` does afterwards.
    """
    import transformers

    if wanted.storage.package == "bitsandbytes":
        if wanted.name == "int8":
            config: Any = transformers.BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=wanted.name,
                bnb_4bit_use_double_quant=wanted.double,
                bnb_4bit_compute_dtype=dtype,
            )
    elif wanted.storage.package == "torchao":
        from lorakit.core.quantization.torchao import int8_config

        config = transformers.TorchAoConfig(int8_config())
    else:
        return {}
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: nn.Module, wanted: Quantization | None, source: ModelSource) -> None:
    """Finish a loaded model: quantise what transformers could not, and hold still what would rewrite itself.

    Args:
        model: The loaded model, changed in place.
        wanted: How to store, or None for as the files have it.
        source: For messages.

    Raises:
        ModelError: A module cannot be stored so, or its package computes it wrongly here.
    """
    if wanted is not None and wanted.storage.package == "hqq":
        _quantise_by_hqq(model, wanted, source)
    from lorakit.core.model.base_view import wrongly_multiplied_out
    from lorakit.core.quantization import hold_still

    hold_still(model)
    wrong = wrongly_multiplied_out(model)
    if wrong is not None:
        raise ModelError(
            f"{source.given}: on this device the quantiser's package multiplies out {wrong[0]} wrongly, by up to "
            f"{format_percent(wrong[1], 0)} of its largest number (bitsandbytes does so on a CPU for widths that are a "
            "multiple of 16 and not of 64). Take another quantization, or another device.",
            where=source.given,
        )


def refuse_twice(config: Any, wanted: Quantization | None, source: ModelSource) -> bool:
    """Whether a model's files are quantised already, which excludes quantising it again.

    Args:
        config: The model's config.
        wanted: What was asked for.
        source: For the message.

    Returns:
        Whether they are.

    Raises:
        ConfigError: They are, and a quantisation was asked for.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is not None and wanted is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", "unknown")
        raise ConfigError(
            f"{source.given}: its files are quantised already ({getattr(method, 'value', method)}); leave out "
            f"quantization {wanted.name!r}.",
            where=source.given,
        )
    return stored is not None


def words_of_files(config: Any) -> Quantization | None:
    """How a model's files are quantised, in the words of `--quantization`.

    Args:
        config: The model's config.

    Returns:
        The quantisation, or None where the files are plain or quantised in a way that has no word.
    """
    facts: Any = getattr(config, "quantization_config", None)
    facts = facts if isinstance(facts, dict) else facts.to_dict() if facts is not None else {}
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))
    if method == "bitsandbytes" and facts.get("load_in_8bit"):
        return Quantization("int8")
    if method == "bitsandbytes" and facts.get("bnb_4bit_quant_type") in ("nf4", "fp4"):
        return Quantization(facts["bnb_4bit_quant_type"], bool(facts.get("bnb_4bit_use_double_quant")))
    if method == "torchao" and "Int8WeightOnlyConfig" in str(facts.get("quant_type")):
        return Quantization("int8-torchao")
    return None


def _quantise_by_hqq(model: nn.Module, wanted: Quantization, source: ModelSource) -> None:
    from lorakit.core.model.base_view import quantised_linear

    storage = wanted.storage
    for site in quantized_sites(shape_of_module(model, source.given, source.given), storage):
        whole = BLOCK * 8 // storage.bits  # packed bytes hold the numbers of groups that lie half the weight apart
        if site.weight_parameters % whole:
            raise ModelError(
                f"{source.given}: {site.path} holds {site.weight_parameters:,} numbers, no multiple of {whole}, so hqq "
                "cannot store it. Take another quantization.",
                where=source.given,
            )
        linear: Any = model.get_submodule(site.path)
        model.set_submodule(site.path, quantised_linear(linear, wanted))
    vars(model)["hqq_quantized"] = True  # what programs of the field look for
