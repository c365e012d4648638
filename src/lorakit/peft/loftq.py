"""LoftQ beside a base in four bits: factors that make up for what quantising lost, from the weights as they were."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.inits import Blank
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
    """Give an adapter beside a 4-bit base the factors that bring it nearest to the base as it was.

    At each site s·B·A is the best of rank r for W − Q, with W read from the model's safetensors, one weight at a time.
    A DoRA magnitude becomes the norm of what the site then is. PEFT leaves the scale and the magnitude out, which is
    right at a scale of 1 without DoRA alone, and takes the weights of GPT-2's Conv1D, which lie transposed on disk, for
    those of a dense layer. Where something is refused, or a callback raises, every site is as it was.

    Args:
        peft_model: The wrapper.
        model_path: Folder with the base's safetensors, or a file of them; None for where the model came from, which
            may be the hub's cache.
        adapter_name: The adapter, whose A and B are written.
        callback: Called with wrapper and path after each site; where it returns False, the site is put back.

    Raises:
        ConfigError: The weights cannot be found, a weight is not among them or has another shape, the scale is 0, or r
            is larger than a weight.
        ConfigTypeError: The model is no wrapper.
        AdapterError: No site of the adapter is stored in four bits, or it is merged.
        ModelError: The folder holds no safetensors.

    Source:
        Li et al. 2023, arXiv:2310.08659, one step of algorithm 1 with the quantised weight given.
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
            here = _write(layer, adapter_name, path, W.T if _lies_transposed(layer) else W)
            written += here
            if callback is not None and not callback(peft_model, path):
                _put_back(here)
    except BaseException:
        _put_back(reversed(written))
        raise


def _sites(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    found = {path: layer for path, layer in layers(model) if name in layer.r and layer.base.name == FOUR_BIT}
    if not found:
        raise AdapterError(f"No bnb LoRA module found on the model: no 4-bit module with adapter {name!r}.")
    merged = next((path for path, layer in found.items() if name in layer.merged_adapters), None)
    if merged is not None:
        raise AdapterError(f"Adapter {name!r} is merged at {merged}; unmerge it before its factors are replaced.")
    return found


def _lies_transposed(layer: LoraLayer) -> bool:
    return getattr(layer.source, "source_cls", nn.Linear).__name__ == "Conv1D"


def _name(source: TensorSource, path: str, layer: LoraLayer) -> str:
    name = source.under([f"{path}.weight"])
    if name is None:
        raise ConfigError(
            f"{source.label}: there is no {path}.weight, so this is not where the model came from.", where=source.label
        )
    shape = (layer.slot.out_features, layer.slot.in_features)
    expected = shape[::-1] if _lies_transposed(layer) else shape
    if source.shapes[name] != expected:
        raise ConfigError(
            f"{source.label}: {name} has shape {source.shapes[name]}, and the model has {expected} there, so this is "
            "not where the model came from.",
            where=source.label,
        )
    return name


def _write(layer: LoraLayer, name: str, path: str, W: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Write the factors for W (out, in); returns what was written to, each with what was there."""
    factor, kind = layer.factor(name), layer.kind
    with torch.no_grad():
        now = layer.read(name)
        shapes = (tuple(factor.A.shape), tuple(factor.B.shape))
        device, dtype = factor.A.device, factor.A.dtype
        config = layer.state.configs[name].with_fields(init_lora_weights="loftq")
        blank = Blank(kind, layer.slot, layer.r[name], factor.scale, shapes, device, dtype, path, lambda: now, config)
        blank.check_rank(min(now.shape))
        A, B = blank.laid(*residual_factors(blank, (W.to(now) - now)[None]))
        new: list[tuple[Any, Tensor]] = [(factor.A, A), (factor.B, B)]
        start = Start(kind, layer.slot, A, B, factor.scale, lambda: now, factor.setting)
        begins = factor.variant.starts(start)
        new += [(tensor, begins[held].to(tensor)) for held, tensor in factor.own.items()]
        before = [(tensor, tensor.data) for tensor, _ in new]
        for tensor, numbers in new:
            tensor.data = numbers
    return before


def _put_back(written: Any) -> None:
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
                f"The model.safetensors file must be present on disk, but it could not be found: {name} is no folder, "
                "and not in the hub's cache. Pass model_path."
            )
        return found
    path = Path(given)
    return path.parent if path.suffix == ".safetensors" and not path.is_file() else path  # shards lie beside it
