"""Read an adapter that will be trained further: its config as in training, and which sites it has, without a model.

`load_adapter` derives sites from the names of an adapter's tensors, because regular expressions in files are never
evaluated. This module derives a config from the same names, so that an adapter's parameters can be counted before a
model is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorakit.config import LoraConfig
from lorakit.core.attachment.residual_base import InitRecord, init_record_of
from lorakit.core.files.adapter_folder import AdapterFiles, parameters_meant, rank_and_alpha, read_adapter
from lorakit.core.files.tensor_names import by_site
from lorakit.core.model.index import INSIDE
from lorakit.durable import JsonObject
from lorakit.targets import exact_key


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter on disk that can be trained further.

    Attributes:
        config: The adapter's config in training; its patterns may be regular expressions.
        literal: A config that selects the same sites with the same ranks, by their paths only.
        sites: Paths of the adapted modules, sorted; without those of `target_parameters`.
        facts: Metadata in `lorakit.json`.
        head_outputs: See `AdapterFiles.head_outputs`.
    """

    folder: Path
    config: LoraConfig
    literal: LoraConfig
    sites: tuple[str, ...]
    weights_sha256: str
    facts: JsonObject
    head_outputs: int | None = None


def read_for_training(folder: str | os.PathLike[str]) -> TrainedAdapter:
    """Read and verify an adapter that will be trained further, from its directory or a run directory, without a model.

    Raises:
        AdapterFileError: A file is missing or damaged, or the init changed the base and the files do not say how.
        NotYetSupported: The adapter needs a feature that is not implemented.
    """
    files = read_adapter(folder)
    past = init_record_of(files, True, ())
    modules, scaled = _sites(files, past)
    literal = past.config.with_fields(
        target_modules=set(modules) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={exact_key(path, scaled): r for path, (r, _) in scaled.items() if r != past.config.r},
        alpha_pattern={exact_key(path, scaled): a for path, (_, a) in scaled.items() if a != past.config.lora_alpha},
    )
    facts = files.sidecar.facts
    return TrainedAdapter(
        files.folder, past.config, literal, tuple(sorted(modules)), files.file.sha256, facts, files.head_outputs
    )


def _sites(files: AdapterFiles, past: InitRecord) -> tuple[list[str], dict[str, tuple[int, float]]]:
    """Return the paths of the adapted modules, and a dict from each module or parameter to its rank and alpha."""
    modules: list[str] = []
    scaled: dict[str, tuple[int, float]] = {}
    for path, parts in by_site(files.file.tensors).items():
        if "A" not in parts:
            continue
        rank, alpha = rank_and_alpha(files, path, int(parts["A"].shape[0]))
        before = past.sites.get(path)
        if before is not None:
            rank, alpha = int(before["r"]), float(before["lora_alpha"])
        meant = parameters_meant(files.config, path)
        if not meant:
            modules.append(path.replace(INSIDE, ""))
        scaled.update(dict.fromkeys(meant or modules[-1:], (rank, past.config.lora_alpha if alpha is None else alpha)))
    return modules, scaled
