"""How an adapter whose init moved the base is written: as plain LoRA of twice the rank, or as it is trained.

As plain LoRA it acts on the original base in any runtime, and what it began with lies in the last half of its factors.
As it is trained, its first factors lie in a file of their own beside it, since no other program reads them. Every
other adapter has one form.

Save an adapter in PEFT's format, with `lorakit.json` beside it; the files are replaced together.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.config import CONFIG_FILE, HEADS_BY_TASK, LoraConfig, TaskType
from lorakit.core.attachment.residual_base import as_plain, beginning, plain_config
from lorakit.core.files.sidecar import (
    BEGAN,
    FORMAT_VERSION,
    KINDS_KEY,
    METADATA_KEY,
    SIDECAR_FILE,
    WEIGHTS_FILE,
    replaced_files,
    sidecar_bytes,
)
from lorakit.core.files.tensor_file import encode
from lorakit.core.files.tensor_names import PREFIX, adapter_tensors
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.checks import check_allowances, check_known
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import paths_on_disk
from lorakit.core.variants import variant_named
from lorakit.durable import JsonObject, json_bytes, replace_files, replace_in_order, sha256_bytes
from lorakit.errors import OVERRIDE, AdapterError
from lorakit.targets import ALL_LINEAR, names_path, resolve

INITIAL_FILE = "lorakit_initial.safetensors"
"""The first factors of an adapter that moved the base and is written as it is trained."""

Form = Literal["as_lora", "trained", "raw"]


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
    about: JsonObject
    initial: bytes | None = None


def saved_form(
    model: nn.Module | AdapterIndex, name: str, form: Form = "as_lora", tensors: Mapping[str, Tensor] | None = None
) -> SavedForm:
    """Return an adapter's tensors and config in the form in which they are written.

    Args:
        model: The adapted model, or its index; only read.
        name: The adapter.
        form: For one that moved the base: "as_lora", "trained", or "raw": its numbers and no word of how it began.
        tensors: Name on disk -> tensor (…) instead of the model's own, as gathered from several devices.

    Raises:
        AdapterError: It moved a quantised base, so that no plain LoRA is exactly what it is.
    """
    index = AdapterIndex.of(model)
    config = index.known_state().configs[name]
    tensors = adapter_tensors(index, name) if tensors is None else dict(sorted(tensors.items()))
    on_disk = paths_on_disk(index, name)
    here = [(on_disk[path], layer) for path, layer in index.layers(name)]
    sites = {path: {"r": layer.r[name], "lora_alpha": float(layer.lora_alpha[name])} for path, layer in here}
    inits = [(path, layer) for path, layer in here if variant_named(layer.variant[name]).move is None]
    moved = [(path, layer) for path, layer in inits if name in layer.moved_by]
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
    return _doubled(SavedForm(name, tensors, config, sites, {BEGAN: began}))


def converted_form(
    model: nn.Module | AdapterIndex,
    name: str,
    initial: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None = None,
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
    index = AdapterIndex.of(model)
    found = saved_form(index, name, "raw", tensors)
    on_disk = paths_on_disk(index, name)
    for path, layer in index.layers(name):
        _check_plain(path, layer, name, found.config)
        down, up = _keys(on_disk[path], layer)
        first = [initial.get(key) for key in (down, up)]
        if any(a is None or a.shape != found.tensors[key].shape for a, key in zip(first, (down, up), strict=True)):
            raise AdapterError(f"{down} is missing in what was saved before training, or has another shape.")
        pair = found.tensors[down], found.tensors[up]
        found.tensors[down], found.tensors[up] = as_plain(layer.slot, *pair, (first[0], first[1]))  # type: ignore[arg-type]
    return _doubled(found)


def _check_plain(path: str, layer: LoraLayer, name: str, config: LoraConfig) -> None:
    variant = variant_named(layer.variant[name])
    if variant.move is not None:
        raise AdapterError(
            f"{path}: adapter {name!r} is {variant.title}, which is no plain LoRA on the original base. Save it as it "
            "is, or merge it.",
            what=name,
            where=path,
            field=variant.field,
        )
    if name in layer.moved_by and layer.base.quantised:
        raise AdapterError(
            f"{path}: {config.init_lora_weights} moved a quantised base, which was rounded a second time, so adapter "
            f"{name!r} is no plain LoRA on the original. Use `save_as_trained`, or merge it.",
            where=path,
        )


def _doubled(found: SavedForm) -> SavedForm:
    """Return an adapter's form with the config, ranks and alphas of plain LoRA of twice the rank."""
    config, wide = found.config, plain_config(found.config)
    more = wide.lora_alpha / config.lora_alpha if config.lora_alpha else 1.0
    sites = {path: {"r": 2 * site["r"], "lora_alpha": more * site["lora_alpha"]} for path, site in found.sites.items()}
    return dataclasses.replace(found, config=wide, sites=sites)


def _keys(path: str, layer: LoraLayer) -> tuple[str, str]:
    kind = layer.kind
    return f"{PREFIX}{path}.{kind.names[0]}{kind.on_disk}", f"{PREFIX}{path}.{kind.names[1]}{kind.on_disk}"


def _initial(path: str, layer: LoraLayer) -> list[tuple[str, Tensor]]:
    return list(zip(_keys(path, layer), layer.initial or (), strict=True))


@dataclass(frozen=True)
class SavedAdapter:
    """What was written.

    Attributes:
        folder: Where.
        files: The names written.
        weights_bytes: Size of the weights.
        weights_sha256: Their SHA-256, which identifies the adapter whatever its name.
    """

    folder: Path
    files: tuple[str, ...]
    weights_bytes: int
    weights_sha256: str


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model_name_or_path: str | None = None,
    facts: JsonObject | None = None,
    allow: Collection[str] = (),
    tensors: Mapping[str, Tensor] | None = None,
) -> SavedAdapter:
    """Write one adapter as PEFT's two files and `lorakit.json`.

    One whose init moved the base (PiSSA and its like) is written as plain LoRA of twice the rank, which any program
    reads onto the original base; `load_adapter` makes it what it was where it is trained on.

    Args:
        model: The adapted model; only read. A merged adapter is saved as it is.
        folder: Where; it is made when it is missing. An adapter there is replaced as a whole, other files stay.
        name: The adapter.
        base_model_name_or_path: What the user gave as the base; None keeps the config's own.
        facts: More for `lorakit.json` (training facts, hashes of the tokenizer); plain JSON values.
        allow: Refusals to lift: "nonfinite".
        tensors: Name on disk -> tensor (…) to write instead of the model's own, as gathered from several devices.

    Returns:
        What was written.

    Raises:
        AdapterError: There is no such adapter, its numbers are not finite, or it has no plain form.
        DiskError: The disk is full or fails; an adapter that was there is whole, or the message says that it is not.
        ConfigError: A word in `allow` is unknown.
    """
    check_allowances(allow)
    index = AdapterIndex.of(model)
    check_known(index.known_state(), [name])
    found = saved_form(index, name, "as_lora", tensors)
    return save_form(index, folder, found, base_model_name_or_path=base_model_name_or_path, facts=facts, allow=allow)


def save_as_trained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model_name_or_path: str | None = None,
    facts: JsonObject | None = None,
    allow: Collection[str] = (),
    tensors: Mapping[str, Tensor] | None = None,
) -> SavedAdapter:
    """`save_adapter`, but one whose init moved the base keeps the rank that it has, with its first factors beside it.

    Other programs that know the init compute it again on the original base; `load_adapter` needs no init for it.

    Args:
        model: As in `save_adapter`, and so the others; tensors are (…).
        folder: Where.
        name: The adapter.
        base_model_name_or_path: What the user gave as the base.
        facts: More for `lorakit.json`.
        allow: Refusals to lift: "nonfinite".
        tensors: What to write instead of the model's own numbers.

    Returns:
        What was written.

    Raises:
        AdapterError: As `save_adapter`.
        DiskError: Likewise.
        ConfigError: Likewise.
    """
    check_allowances(allow)
    index = AdapterIndex.of(model)
    check_known(index.known_state(), [name])
    found = saved_form(index, name, "trained", tensors)
    return save_form(index, folder, found, base_model_name_or_path=base_model_name_or_path, facts=facts, allow=allow)


def save_form(
    model: nn.Module | AdapterIndex,
    folder: str | os.PathLike[str],
    found: SavedForm,
    *,
    base_model_name_or_path: str | None = None,
    facts: JsonObject | None = None,
    allow: Collection[str] = (),
) -> SavedAdapter:
    """Write an adapter in a form that was made ready; see `save_adapter`.

    Args:
        model: The adapted model, or its index; the fingerprint of its base is written.
        folder: Where.
        found: Tensors, config, sites.
        base_model_name_or_path: What the user gave as the base.
        facts: More for `lorakit.json`.
        allow: Refusals to lift: "nonfinite".

    Raises:
        AdapterError: Its numbers are not finite.
        DiskError: The disk is full or fails.
    """
    if "nonfinite" not in allow:
        _check_finite(found.name, found.tensors)
    index = AdapterIndex.of(model)
    config = _config_on_disk(index, found.config, base_model_name_or_path)
    weights = encode(found.tensors, {"format": "pt", METADATA_KEY: str(FORMAT_VERSION)})
    own = sorted({layer.kind_name for _, layer in index.layers(found.name)} & index.kinds.keys())
    facts = {**(facts or {}), KINDS_KEY: own} if own else facts
    base = fingerprint(index, with_files=True).as_dict()
    about = {**(facts or {}), **found.about, "base": base, "sites": found.sites}
    return write_files(Path(folder), config, weights, about, found.initial)


def write_files(
    folder: Path, config: bytes, weights: bytes, about: Mapping[str, Any], initial: bytes | None = None
) -> SavedAdapter:
    """Write the files of an adapter; a crash leaves the old adapter, the new one, or a folder that is rejected.

    The folder is exchanged for a complete new one, so that it is never mixed. If the system cannot do that, the files
    are replaced in an order in which `lorakit.json` says which ones belong together at any time.

    Args:
        folder: Where; it is made when it is missing. Other files in it stay.
        config: Content of `adapter_config.json`.
        weights: Content of `adapter_model.safetensors`.
        about: For `lorakit.json`, beside what it says of the two: base, sites, facts.
        initial: Content of `lorakit_initial.safetensors`; None removes it.

    Returns:
        What was written.

    Raises:
        DiskError: The disk is full or fails.
    """
    files = {CONFIG_FILE: config, WEIGHTS_FILE: weights, **({} if initial is None else {INITIAL_FILE: initial})}
    last = {SIDECAR_FILE: sidecar_bytes(about, config, weights), **({INITIAL_FILE: None} if initial is None else {})}
    if not replace_files(folder, {**files, **last}):
        first = {SIDECAR_FILE: sidecar_bytes(about, config, weights, replaced_files(folder))}
        replace_in_order(folder, [first, files, last])
    names = (CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE, *(() if initial is None else (INITIAL_FILE,)))
    return SavedAdapter(folder, names, len(weights), sha256_bytes(weights))


def _config_on_disk(index: AdapterIndex, config: LoraConfig, base: str | None) -> bytes:
    transposed = any(
        layer.base.transposed and layer.kind.drops for _, layer in index.layers() if layer.r
    )  # an embedding lies transposed too, but readers ask for dense layers
    heads = HEADS_BY_TASK.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()
    config = dataclasses.replace(
        config,
        target_modules=portable_targets(index, config),
        auto_mapping=config.auto_mapping or (None if config.task_type else _class_of(index.model)),
        modules_to_save=list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None,
        fan_in_fan_out=transposed,
        inference_mode=True,
        base_model_name_or_path=base if base is not None else config.base_model_name_or_path,
    )
    return json_bytes(config.as_json())


def _class_of(model: nn.Module) -> dict[str, str]:
    """Where another program finds the base's class, written as PEFT does when no task is given; never read here."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def portable_targets(index: AdapterIndex, config: LoraConfig) -> set[str] | list[str] | str | None:
    """Return the targets in words that every reader knows: "all-linear" becomes names, the shortest that fit.

    Args:
        index: The adapted model's index.
        config: The adapter's config.
    """
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
            f"Adapter {name!r} holds NaN or infinite numbers in {len(bad)} of {len(tensors)} tensors, first in "
            f"{bad[0]}.",
            advice=f"It was not saved; {OVERRIDE} to save it anyway.",
            what=name,
            where=bad[0],
            override="nonfinite",
        )
