"""Where the result of an operation goes: onto a model as a new adapter, or into a new folder.

On a model it passes the same checks and takes the same way as an adapter that is loaded. Knows nothing of operations.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import scale
from lorakit.core.bases import base_of
from lorakit.core.files.adapter_folder import AdapterFiles
from lorakit.core.files.loading import place_adapter
from lorakit.core.files.saving import SavedAdapter, write_files
from lorakit.core.files.sidecar import FORMAT_VERSION, METADATA_KEY, Sidecar
from lorakit.core.files.tensorfile import TensorFile, encode
from lorakit.core.kinds import PARAMETER, parameter_slot
from lorakit.core.layering.sitemap import INSIDE, Place, SiteMap, defined_parameters, survey
from lorakit.core.operations.gains import Reading
from lorakit.core.operations.loose import LooseAdapter
from lorakit.durable import json_bytes, publish_directory
from lorakit.errors import AdapterError, UsageError


def put(model: nn.Module, adapter: LooseAdapter, name: str) -> None:
    """Put an adapter on a model; it is frozen, and not active where there is another.

    Args:
        model: The base, or a model that has adapters already.
        adapter: What to put there.
        name: Its name on the model.

    Raises:
        AdapterError: The name is taken or cannot be used, or the adapter's numbers are not finite.
        AdapterFileError: It does not fit the model.
    """
    _check_finite(adapter.tensors())
    side = Sidecar(False, (), "", None, _sites(adapter), {})
    file = TensorFile(adapter.tensors(), {}, "", 0)
    files = AdapterFiles(Path(name), adapter.config, file, side, True, (), made=True)
    place_adapter(model, files, name, False, ("odd_scale",))


def write(
    adapter: LooseAdapter, folder: str | os.PathLike[str], *, replace: bool = False, allow: Collection[str] = ()
) -> SavedAdapter:
    """Write an adapter into a folder, in PEFT's format with `lorakit.json`.

    Args:
        adapter: What to write.
        folder: Where; a new one, of which nothing is left on an error, unless `replace` is set.
        replace: Write over an adapter that stands there, file by file.
        allow: Refusals to lift: "nonfinite".

    Returns:
        What was written.

    Raises:
        UsageError: Something stands there.
        AdapterError: The numbers are not finite.
        DiskError: The disk refuses.
    """
    folder = Path(folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: is not an empty folder; nothing is overwritten. Give a new one.")
    tensors = adapter.tensors()
    if "nonfinite" not in allow:
        _check_finite(tensors)
    weights = encode(tensors, {"format": "pt", METADATA_KEY: str(FORMAT_VERSION)})
    config = json_bytes({**adapter.config.as_json(), "inference_mode": True})
    base = None if adapter.base is None else adapter.base.as_dict()
    about: dict[str, Any] = {**adapter.facts, "base": base, "sites": _sites(adapter)}
    if replace:
        return write_files(folder, config, weights, about)
    with publish_directory(folder) as fresh:
        saved = write_files(fresh, config, weights, about)
    return dataclasses.replace(saved, folder=folder)


def reader_of(model: nn.Module) -> Callable[[str], Reading]:
    """How to read the base of a model, with or without adapters, as DoRA needs it.

    Args:
        model: Only read.

    Returns:
        Path of a site, or of a bare parameter -> the weight there, (out, in, …), as it was before any merge. It raises
        AdapterError where there is none.
    """
    site_map = survey(model)
    kinds = {candidate.path: candidate.kind for candidate in site_map.candidates}

    def at(path: str) -> Reading:
        outer = path.partition(INSIDE)[0]
        places = site_map.places(outer, site_map.kind(kinds[outer])) if kinds.get(outer) else []  # type: ignore[arg-type]
        place = next((place for place in places if place.path == path), None) or _bare_place(site_map, path)
        if place is None:
            raise AdapterError(f"The model has no site {path}, at which an adapter sits.")
        layer, holder, parameter = site_map.layer(place), site_map.holder(place), place.slot.parameter
        base = base_of(holder, parameter, place.slot.as_stored)
        stored = base.stored(holder, parameter) if layer is None else layer.original()
        W = stored if place.slot.experts else base.read(holder, stored).double()
        return Reading(W, place.kind, place.slot)

    return at


def _bare_place(site_map: SiteMap, path: str) -> Place | None:
    module, _, parameter = path.rpartition(".")
    if module not in site_map.modules or parameter not in defined_parameters(site_map.base(module)):
        return None
    return Place(path, module, PARAMETER, parameter_slot(site_map.base(module), parameter))


def _sites(adapter: LooseAdapter) -> dict[str, dict[str, float]]:
    """Rank and alpha of each site, such that alpha gives the factor's own scale."""
    unit = {r: scale(r, 1.0, adapter.config.use_rslora) for r in {factor.r for factor in adapter.factors.values()}}
    return {path: {"r": f.r, "lora_alpha": f.scale / unit[f.r]} for path, f in adapter.factors.items()}


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise AdapterError(f"The result holds NaN or infinite numbers, first in {bad[0]}; nothing was kept.")
