"""How an adapter whose init moved the base is written: as plain LoRA of twice the rank, or as it is trained.

As plain LoRA it acts on the original base in any runtime, and what it began with lies in the last half of its factors.
As it is trained, its first factors lie in a file of their own beside it, since no other program reads them. Every
other adapter has one form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.files.keys import PREFIX, adapter_tensors
from lorakit.core.files.sidecar import BEGAN
from lorakit.core.files.tensorfile import encode
from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.parameter_sites import paths_on_disk
from lorakit.core.layering.sitemap import layers, state_of
from lorakit.core.making.residual import as_plain, beginning, plain_config
from lorakit.durable import sha256_bytes
from lorakit.errors import AdapterError

INITIAL_FILE = "lorakit_initial.safetensors"
"""The first factors of an adapter that moved the base and is written as it is trained."""

Form = Literal["plain", "trained", "raw"]


@dataclass(frozen=True)
class SavedForm:
    """An adapter as it is written.

    Attributes:
        name: The adapter.
        tensors: Name on disk -> tensor (…).
        config: Its config.
        sites: Path -> rank and alpha.
        about: What `lorakit.json` says of how it began; empty where its init left the base alone.
        initial: Content of `INITIAL_FILE`, or None.
    """

    name: str
    tensors: dict[str, Tensor]
    config: LoraConfig
    sites: dict[str, dict[str, float]]
    about: dict[str, Any]
    initial: bytes | None = None


def saved_form(
    model: nn.Module, name: str, form: Form = "plain", tensors: Mapping[str, Tensor] | None = None
) -> SavedForm:
    """An adapter's numbers and config in the form in which they are written.

    Args:
        model: The adapted model; only read.
        name: The adapter.
        form: For one that moved the base: "plain", "trained", or "raw": its numbers and no word of how it began.
        tensors: Name on disk -> tensor (…) instead of the model's own, as gathered from several devices.

    Raises:
        AdapterError: It moved a quantised base, so that no plain LoRA is exactly what it is.
    """
    config = state_of(model).configs[name]
    tensors = adapter_tensors(model, name) if tensors is None else dict(sorted(tensors.items()))
    on_disk = paths_on_disk(model, name)
    here = [(on_disk[path], layer) for path, layer in layers(model) if path in on_disk]
    sites = {path: {"r": layer.r[name], "lora_alpha": float(layer.lora_alpha[name])} for path, layer in here}
    moved = [(path, layer) for path, layer in here if layer.moved_by == name]
    if not moved or form == "raw":
        return SavedForm(name, tensors, config, sites, {})
    began = {**beginning(config), "sites": sites}
    if any(layer.initial is None for _, layer in moved):  # LoftQ: the base lost more than a product of low rank
        return SavedForm(name, tensors, config, sites, {BEGAN: began})
    if form == "trained":
        first = {key: tensor for path, layer in moved for key, tensor in _initial(path, layer)}
        initial = encode(first, {"format": "pt"})
        began |= {"file": INITIAL_FILE, "sha256": sha256_bytes(initial)}
        return SavedForm(name, tensors, config, sites, {BEGAN: began}, initial)
    for path, layer in moved:
        _check_plain(path, layer, name, config)
        down, up = _keys(path, layer)
        tensors[down], tensors[up] = as_plain(layer.slot, tensors[down], tensors[up], layer.initial)  # type: ignore[arg-type]
    return SavedForm(name, tensors, about={BEGAN: began}, **_doubled(config, sites))


def converted_form(
    model: nn.Module, name: str, initial: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None
) -> SavedForm:
    """An adapter as plain LoRA of twice the rank, less what it began with, which comes from a file.

    Args:
        model: The adapted model; only read.
        name: The adapter.
        initial: Name on disk -> tensor (…), as it was saved before training.
        tensors: As in `saved_form`.

    Raises:
        AdapterError: The tensors are those of another adapter, or it moved a quantised base.
    """
    found = saved_form(model, name, "raw", tensors)
    on_disk = paths_on_disk(model, name)
    for path, layer in layers(model):
        if path in on_disk:
            _check_plain(path, layer, name, found.config)
            down, up = _keys(on_disk[path], layer)
            first = [initial.get(key) for key in (down, up)]
            if any(a is None or a.shape != found.tensors[key].shape for a, key in zip(first, (down, up), strict=True)):
                raise AdapterError(f"{down} is missing in what was saved before training, or has another shape.")
            pair = found.tensors[down], found.tensors[up]
            found.tensors[down], found.tensors[up] = as_plain(layer.slot, *pair, (first[0], first[1]))  # type: ignore[arg-type]
    return dataclasses.replace(found, **_doubled(found.config, found.sites))


def _check_plain(path: str, layer: LoraLayer, name: str, config: LoraConfig) -> None:
    if layer.moved_by == name and layer.base.quantised:
        raise AdapterError(
            f"{path}: {config.init_lora_weights} moved a quantised base, which was rounded a second time, so adapter "
            f"{name!r} is no plain LoRA on the original. Use `save_as_trained`, or merge it."
        )


def _doubled(config: LoraConfig, sites: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    wide = plain_config(config)
    more = wide.lora_alpha / config.lora_alpha if config.lora_alpha else 1.0
    return {
        "config": wide,
        "sites": {path: {"r": 2 * site["r"], "lora_alpha": more * site["lora_alpha"]} for path, site in sites.items()},
    }


def _keys(path: str, layer: LoraLayer) -> tuple[str, str]:
    kind = layer.kind
    return f"{PREFIX}{path}.{kind.names[0]}{kind.on_disk}", f"{PREFIX}{path}.{kind.names[1]}{kind.on_disk}"


def _initial(path: str, layer: LoraLayer) -> list[tuple[str, Tensor]]:
    return list(zip(_keys(path, layer), layer.initial or (), strict=True))
