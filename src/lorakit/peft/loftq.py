"""LoftQ beside a base in four bits: factors that make up for what quantising lost, from the weights as they were."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.sitemap import layers
from lorakit.core.operations.lowrank import dense_spectrum
from lorakit.core.operations.sources import source_of_folder
from lorakit.errors import AdapterError, ConfigError

FOUR_BIT = "bitsandbytes 4-bit"


def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give an adapter beside a 4-bit base the factors that bring it nearest to the base as it was.

    At each site s·B·A is the best of rank r for W − Q, with W read from the model's safetensors, one weight at a time.
    PEFT leaves the scale out, which is right at a scale of 1 alone.

    Args:
        peft_model: The wrapper.
        model_path: Folder (or a file in it) with the base's safetensors; None for where the model came from.
        adapter_name: The adapter, whose A and B are written.
        callback: Called with wrapper and path after each site; where it returns False, the site is put back.

    Raises:
        ConfigError: The weights cannot be found, or a weight is not among them.
        AdapterError: No site of the adapter is stored in four bits.
        ModelError: The folder holds no safetensors.
    """
    model = peft_model.get_base_model()
    sites = [(p, m) for p, m in layers(model) if adapter_name in m.r and m.base.name == FOUR_BIT]
    if not sites:
        raise AdapterError(f"No bnb LoRA module found on the model: no 4-bit module with adapter {adapter_name!r}.")
    source = source_of_folder(_folder(model, model_path))
    for path, layer in sites:
        name = source.under([f"{path}.weight"])
        if name is None:
            raise ConfigError(f"{source.label}: there is no {path}.weight, so this is not where the model came from.")
        A, B = _nearest(layer, adapter_name, source.read(name))
        factor = layer.factor(adapter_name)
        before = factor.A.data, factor.B.data
        factor.A.data, factor.B.data = A.to(factor.A), B.to(factor.B)
        if callback is not None and not callback(peft_model, path):
            factor.A.data, factor.B.data = before


def _nearest(layer: LoraLayer, name: str, W: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        now = layer.read()
        r, scale = layer.r[name], layer.scaling[name]
        if scale == 0:
            raise ConfigError("The scale is 0, so no B·A makes up for anything. Give an alpha.")
        found = dense_spectrum(W.to(now) - now, r)[0]
        root = (found.S[0, :r] / abs(scale)).sqrt()
        return root[:, None] * found.Vh[0, :r], found.U[0, :, :r] * (root if scale > 0 else -root)


def _folder(model: Any, given: str | PathLike[str] | None) -> Path:
    if given is None:
        given = getattr(getattr(model, "config", None), "_name_or_path", None)
        if not given or not Path(given).is_dir():
            raise ConfigError(
                "The passed model does not appear to be a transformers model or is a local model. In this case, you "
                "must pass the model_path argument that points to the safetensors file."
            )
    path = Path(given)
    return path.parent if path.suffix == ".safetensors" else path
