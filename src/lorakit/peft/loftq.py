"""LoftQ on a 4-bit base: factors that compensate for the quantization error, from the original weights."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.inits import InitContext
from lorakit.core.inits.loftq import residual_factors
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import layers
from lorakit.core.operations.tensor_sources import TensorSource, source_of_folder
from lorakit.core.variants import Start
from lorakit.errors import AdapterError, ConfigError, ConfigTypeError
from lorakit.peft import adapter_queries

FOUR_BIT = "bitsandbytes 4-bit"


def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Replace an adapter's factors on a 4-bit base by those that bring it closest to the original base.

    At each site s·B·A is the best approximation of rank r to W − Q, with W read from the model's safetensors, one
    weight at a time. A DoRA magnitude becomes the norm of the resulting weight. PEFT ignores the scale and the
    magnitude, which is correct only for a scale of 1 without DoRA, and reads GPT-2's Conv1D weights, which are stored
    transposed, as those of a linear layer. If an error is raised, also by a callback, every site is restored.

    Args:
        peft_model: The wrapper.
        model_path: Directory with the base's safetensors, or a file of them; None for the model's origin, which may be
            the hub's cache.
        adapter_name: The adapter, whose A and B are replaced.
        callback: Called with wrapper and path after each site; if it returns False, the site is restored.

    Raises:
        ConfigError: The weights are not found, a weight is missing or has another shape, the scale is 0, or r is
            larger than a weight.
        ConfigTypeError: The model is not a wrapper.
        AdapterError: No site of the adapter is a 4-bit layer, or the adapter is merged.
        ModelError: The directory holds no safetensors.

    Source:
        Li et al. 2023, arXiv:2310.08659, one step of algorithm 1 for a given quantized weight.
    """
    if not isinstance(peft_model, nn.Module) or not adapter_queries.is_wrapper(peft_model):
        raise ConfigTypeError("The passed model does not appear to be a valid PeftModel; get_peft_model makes one.")
    wrapper: Any = peft_model
    model = wrapper.get_base_model()
    sites = _sites(model, adapter_name)
    source = source_of_folder(_where(model, model_path))
    names = {path: _name(source, path, layer) for path, layer in sites.items()}
    written: list[tuple[Tensor, Tensor]] = []
    try:
        for path, layer in sites.items():
            W = source.read(names[path])
            here = _write(layer, adapter_name, path, W.T if _is_transposed(layer) else W)
            written += here
            if callback is not None and not callback(peft_model, path):
                _restore(here)
    except BaseException:
        _restore(reversed(written))
        raise


def _sites(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    found = {path: layer for path, layer in layers(model) if name in layer.r and layer.base.name == FOUR_BIT}
    if not found:
        raise AdapterError(f"No bnb LoRA module found on the model: no 4-bit module with adapter {name!r}.")
    merged = next((path for path, layer in found.items() if name in layer.merged_adapters), None)
    if merged is not None:
        raise AdapterError(f"Adapter {name!r} is merged at {merged}; unmerge it before its factors are replaced.")
    return found


def _is_transposed(layer: LoraLayer) -> bool:
    return getattr(layer.source, "source_cls", nn.Linear).__name__ == "Conv1D"


def _name(source: TensorSource, path: str, layer: LoraLayer) -> str:
    name = source.under([f"{path}.weight"])
    if name is None:
        raise ConfigError(
            f"{source.label}: there is no {path}.weight, so this is not where the model came from.", where=source.label
        )
    shape = (layer.slot.out_features, layer.slot.in_features)
    expected = shape[::-1] if _is_transposed(layer) else shape
    if source.shapes[name] != expected:
        raise ConfigError(
            f"{source.label}: {name} has shape {source.shapes[name]}, and the model has {expected} there, so this is "
            "not where the model came from.",
            where=source.label,
        )
    return name


def _write(layer: LoraLayer, name: str, path: str, W: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Write the factors for W (out, in); returns the changed tensors with their previous data."""
    factor, kind = layer.factor(name), layer.kind
    if factor.variant.shapes is not None or factor.variant.move is not None:
        raise ConfigError(
            f"{path}: adapter {name!r} is {factor.variant.title}, whose A and B cannot be what quantizing lost. Leave "
            "the module out.",
            what=name,
            where=path,
            field=factor.variant.field,
        )
    with torch.no_grad():
        now = layer.read(name)
        shapes = (tuple(factor.A.shape), tuple(factor.B.shape))
        device, dtype = factor.A.device, factor.A.dtype
        config = layer.state.configs[name].with_fields(init_lora_weights="loftq")
        blank = InitContext(
            kind, layer.slot, layer.r[name], factor.scale, shapes, device, dtype, path, lambda: now, config
        )
        blank.check_rank(min(now.shape))
        A, B = blank.laid(*residual_factors(blank, (W.to(now) - now)[None]))
        new: list[tuple[Any, Tensor]] = [(factor.A, A), (factor.B, B)]
        start = Start(kind, layer.slot, A, B, factor.scale, lambda: now, path, factor.setting)
        begins = factor.variant.starts(start)
        new += [(tensor, begins[held].to(tensor)) for held, tensor in factor.own.items()]
        before = [(tensor, tensor.data) for tensor, _ in new]
        for tensor, numbers in new:
            tensor.data = numbers
    return before


def _restore(written: Any) -> None:
    for tensor, before in written:
        tensor.data = before


def _where(model: Any, given: str | PathLike[str] | None) -> Path:
    if given is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        if not name:
            raise ConfigError(
                "The provided model does not appear to be a transformers model or is a local model. In this case, you "
                "must pass the model_path argument that points to the safetensors file."
            )
        if Path(name).is_dir():
            return Path(name)
        from lorakit.hub.sources import downloaded

        found = downloaded(name)
        if found is None:
            raise ConfigError(
                f"The model.safetensors file must be present on disk, but it could not be found: {name} is not "
                "a directory and not in the hub's cache. Pass model_path."
            )
        return found
    path = Path(given)
    return path.parent if path.suffix == ".safetensors" and not path.is_file() else path  # a sharded checkpoint
