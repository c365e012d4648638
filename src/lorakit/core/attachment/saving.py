"""Save an adapter in PEFT's format, with an additional `lorakit.json`; all files are replaced together.

An adapter with a residual base can be saved either as plain LoRA or as trained. The plain LoRA form has twice the rank,
because it also contains the initial factors, and any program can run it on the original base. The trained form keeps
the rank, and the initial factors go into a separate file that only lorakit reads. For all other adapters, the two forms
are identical.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.config import HEADS_BY_TASK, LoraConfig
from lorakit.core.attachment.residual_base import INIT_FIELDS, as_plain, check_plain, plain_config
from lorakit.core.clones import own_class
from lorakit.core.files import adapter_folder
from lorakit.core.files.tensors import adapter_tensors, encode, endings_of
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model import checks
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import paths_on_disk
from lorakit.core.variants import variant_named
from lorakit.durable import JsonObject, json_bytes, sha256_bytes
from lorakit.errors import OVERRIDE, AdapterError
from lorakit.targets.patterns import names_path
from lorakit.targets.resolving import ALL_LINEAR, resolve
from lorakit.tensor_headers import PREFIX

Form = Literal["as_lora", "trained", "raw"]


@dataclass(frozen=True)
class SavedForm:
    """An adapter in the form in which it will be saved.

    Attributes:
        tensors: Name on disk -> tensor (…).
        sites: Path on disk -> rank and alpha of the site.
        about: The initial state to record in `lorakit.json`; empty if the initialization does not change the base.
        initial: Contents of `INITIAL_FILE`, or None if that file is not needed.
    """

    name: str
    tensors: dict[str, Tensor]
    config: LoraConfig
    sites: dict[str, dict[str, float]]
    about: JsonObject
    initial: bytes | None = None


def saved_form(
    model: nn.Module | AdapterIndex, name: str, form: Form = "as_lora", tensors: Mapping[str, Tensor] | None = None
) -> SavedForm:
    """Return an adapter's tensors and config in the form in which they will be saved.

    An adapter with a residual base is saved "as_lora", "trained", or "raw" (without the initial state). `tensors`, name
    on disk -> tensor (…), has those that were gathered from several devices; None uses the model's.

    Raises:
        AdapterError: The residual base is quantized, so plain LoRA cannot represent the adapter exactly; or an
            adapted module was replaced by hand.
    """
    index = AdapterIndex.of(model)
    index.known_state().check([name], AdapterError)
    index.check_complete([name])
    config = index.known_state().configs[name]
    tensors = adapter_tensors(index, name) if tensors is None else dict(sorted(tensors.items()))
    on_disk = paths_on_disk(index, name)
    here = [(on_disk[path], layer) for path, layer in index.layers(name)]
    sites = {path: {"r": layer.r[name], "lora_alpha": float(layer.lora_alpha[name])} for path, layer in here}
    inits = [(path, layer) for path, layer in here if variant_named(layer.variant[name]).move is None]
    moved = [(path, layer) for path, layer in inits if name in layer.moved_by]
    form_on_disk = SavedForm(name, tensors, config, sites, {})
    if not moved or form == "raw":
        return form_on_disk
    values = config.as_json()
    began = {**{field: values[field] for field in INIT_FIELDS}, "sites": sites}
    form_on_disk = dataclasses.replace(form_on_disk, about={adapter_folder.BEGAN: began})
    first: dict[str, Tensor] = {}
    for path, layer in moved:
        if layer.initial is None:  # LoftQ, which changes the base by more than a low-rank product
            return form_on_disk
        first |= zip(_keys(path, layer), layer.initial, strict=True)
    if form == "as_lora":
        return _as_lora(form_on_disk, moved, first)
    initial = encode(first, {"format": "pt"})
    began = {**began, "file": adapter_folder.INITIAL_FILE, "sha256": sha256_bytes(initial)}
    return dataclasses.replace(form_on_disk, about={adapter_folder.BEGAN: began}, initial=initial)


def converted_form(
    model: nn.Module | AdapterIndex,
    name: str,
    initial: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None = None,
) -> SavedForm:
    """Return an adapter as plain LoRA with twice the rank, given its initial factors (…) by name on disk."""
    index = AdapterIndex.of(model)
    on_disk = paths_on_disk(index, name)
    layers = [(on_disk[path], layer) for path, layer in index.layers(name)]
    return _as_lora(saved_form(index, name, "raw", tensors), layers, initial)


def _as_lora(trained: SavedForm, layers: Sequence[tuple[str, LoraLayer]], initial: Mapping[str, Tensor]) -> SavedForm:
    """Convert an adapter to plain LoRA with twice the rank.

    `layers` has the path on disk of each site with a residual base; `initial` maps names on disk to initial factors
    (…).
    """
    tensors = dict(trained.tensors)
    check_plain(layers, trained.name, trained.config)
    for path, layer in layers:
        down, up = _keys(path, layer)
        first = [initial[key] for key in (down, up) if key in initial and initial[key].shape == tensors[key].shape]
        if len(first) != 2:
            text = f"{down} is missing from the adapter that was saved before training, or has a different shape."
            raise AdapterError(text, what=trained.name, where=down)
        tensors[down], tensors[up] = as_plain(layer.spec, tensors[down], tensors[up], (first[0], first[1]))
    wide = plain_config(trained.config)
    more = wide.lora_alpha / trained.config.lora_alpha if trained.config.lora_alpha else 1.0
    sites = {
        path: {"r": 2 * site["r"], "lora_alpha": more * site["lora_alpha"]} for path, site in trained.sites.items()
    }
    return dataclasses.replace(trained, tensors=tensors, config=wide, sites=sites)


def _keys(path: str, layer: LoraLayer) -> tuple[str, str]:
    down, up = endings_of(layer.kind)
    return f"{PREFIX}{path}{down}", f"{PREFIX}{path}{up}"


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model_name_or_path: str | None = None,
    facts: JsonObject | None = None,
    allow: Collection[str] = (),
    tensors: Mapping[str, Tensor] | None = None,
) -> adapter_folder.SavedAdapter:
    """Save an adapter in PEFT's format, with an additional `lorakit.json`.

    An adapter with a residual base (PiSSA and similar) is written as plain LoRA with twice the rank, which any program
    can load on the original base; `load_adapter` converts it back to continue training.

    Args:
        model: The adapted model; not changed. Merging does not affect what is saved.
        folder: The directory; created if missing. Existing adapter files are replaced; other files are kept.
        name: The adapter.
        base_model_name_or_path: Name or path of the base; None keeps the config's value.
        facts: Metadata for `lorakit.json`, such as training details and tokenizer hashes, as plain JSON values.
        allow: Names of checks to override: "nonfinite".
        tensors: Name on disk -> tensor (…), for tensors gathered from several devices; None writes the model's tensors.

    Raises:
        AdapterError: The adapter is not on the model, has non-finite values, or cannot be converted to plain LoRA.
        DiskError: The disk is full or fails; an existing adapter stays intact unless the message says otherwise.
        ConfigError: A name in `allow` is unknown.
    """
    index = AdapterIndex.of(model)
    saved = saved_form(index, name, "as_lora", tensors)
    return save_form(index, folder, saved, base_model_name_or_path=base_model_name_or_path, facts=facts, allow=allow)


def save_as_trained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model_name_or_path: str | None = None,
    facts: JsonObject | None = None,
    allow: Collection[str] = (),
    tensors: Mapping[str, Tensor] | None = None,
) -> adapter_folder.SavedAdapter:
    """Save an adapter as `save_adapter` does, but keep its rank if it has a residual base.

    The initial factors, each tensor of any shape, are written to a separate file, so that `load_adapter` does not need
    to rerun the init. Other programs that support this initialization will rerun it on the original base.
    """
    index = AdapterIndex.of(model)
    saved = saved_form(index, name, "trained", tensors)
    return save_form(index, folder, saved, base_model_name_or_path=base_model_name_or_path, facts=facts, allow=allow)


def save_form(
    model: nn.Module | AdapterIndex,
    folder: str | os.PathLike[str],
    saved: SavedForm,
    *,
    base_model_name_or_path: str | None = None,
    facts: JsonObject | None = None,
    allow: Collection[str] = (),
) -> adapter_folder.SavedAdapter:
    """Write the result of `saved_form`, with the fingerprint of the model's base; see `save_adapter`."""
    checks.check_allowances(allow)
    if "nonfinite" not in allow:
        _check_finite(saved.name, saved.tensors)
    index = AdapterIndex.of(model)
    config = _config_on_disk(index, saved.config, base_model_name_or_path)
    weights = encode(saved.tensors, {"format": "pt", adapter_folder.METADATA_KEY: str(adapter_folder.FORMAT_VERSION)})
    own = sorted({layer.kind_name for _, layer in index.layers(saved.name)} & index.kinds.keys())
    facts = {**(facts or {}), adapter_folder.KINDS_KEY: own} if own else facts
    base = fingerprint(index, with_files=True).as_dict()
    about = {**(facts or {}), **saved.about, "base": base, "sites": saved.sites}
    return adapter_folder.write_files(Path(folder), config, weights, about, saved.initial)


def _config_on_disk(index: AdapterIndex, config: LoraConfig, base: str | None) -> bytes:
    transposed = any(
        layer.base.transposed and layer.kind.is_dense for _, layer in index.layers() if layer.r
    )  # other weights can be transposed too, but programs apply `fan_in_fan_out` only to dense layers
    heads = HEADS_BY_TASK.get(config.task_type, ())
    kind = own_class(index.model)
    of_class = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config = dataclasses.replace(
        config,
        target_modules=portable_targets(index, config),
        auto_mapping=config.auto_mapping or (None if config.task_type else of_class),  # as in PEFT; lorakit ignores it
        modules_to_save=list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None,
        fan_in_fan_out=transposed,
        inference_mode=True,
        base_model_name_or_path=base if base is not None else config.base_model_name_or_path,
    )
    return json_bytes(config.as_json())


def portable_targets(index: AdapterIndex, config: LoraConfig) -> set[str] | list[str] | str | None:
    """Return the targets of a config in a form that every program supports, without "all-linear"."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != ALL_LINEAR:
        return config.target_modules
    candidates = index.candidates
    paths = {match.path for match in resolve(candidates, config, allow_partial=True).matches}
    words = {path.rpartition(".")[2] for path in paths}
    named = {c.path for c in candidates if any(names_path(word, c.path) for word in words)}
    return words if named == paths else paths


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise AdapterError(
            f"Adapter {name!r} contains NaN or infinite values in {len(bad)} of {len(tensors)} tensors, first in "
            f"{bad[0]}.",
            advice=f"The adapter was not saved; {OVERRIDE} to save it anyway.",
            what=name,
            where=bad[0],
            override="nonfinite",
        )
