"""An adapter's directory, read and verified without a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorakit.config import CONFIG_FILE, LoraConfig, read_config
from lorakit.core.files.sidecar import WEIGHTS_FILE, Sidecar, identities, integrity, read_sidecar
from lorakit.core.files.tensor_file import TensorFile, read_tensors
from lorakit.core.model.index import INSIDE
from lorakit.errors import AdapterFileError, PatternError
from lorakit.targets import names_path
from lorakit.targets.words import literal_value

ATTEMPTS = 3
"""Attempts to read an adapter that another process replaces meanwhile."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder as it was read.

    Attributes:
        folder: Where.
        config: The config.
        file: The weights.
        sidecar: What `lorakit.json` says.
        config_is_ours: The config is byte for byte the one that was written with the weights.
        warnings: Sentences a person should read.
        made: It was made here by an operation, and may do nothing if that was asked for.
    """

    folder: Path
    config: LoraConfig
    file: TensorFile
    sidecar: Sidecar
    config_is_ours: bool
    warnings: tuple[str, ...]
    made: bool = False

    @property
    def is_ours(self) -> bool:
        """Return whether config and weights are, byte for byte, those that `lorakit.json` speaks of."""
        return self.config_is_ours and self.file.sha256 in self.sidecar.weights_sha256


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFiles:
    """Read and verify the files of an adapter; no model is needed.

    Args:
        folder: A folder that PEFT or lorakit wrote.

    Raises:
        AdapterFileError: A file is missing, damaged, or of a kind that is never loaded.
        NotYetSupported: The adapter needs what is not built yet.
    """
    folder = Path(folder)
    if folder.is_file():
        raise AdapterFileError(f"{folder} is a file; an adapter is a folder with {CONFIG_FILE}.")
    for _ in range(ATTEMPTS):
        before = identities(folder)
        try:
            files = _read_once(folder)
        except (AdapterFileError, OSError):
            if identities(folder) == before:
                raise
        else:
            if identities(folder) == before:
                return files
    raise AdapterFileError(
        f"{folder}: its files changed while they were read. Load it when nothing writes there.", where=folder
    )


def _read_once(folder: Path) -> AdapterFiles:
    """Read and verify the files; another process may replace them meanwhile."""
    config, unknown = read_config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{folder}: the weights are a pickle (adapter_model.bin), which is never loaded, since it can run code. "
            f"Convert it to {WEIGHTS_FILE} with the program that wrote it.",
            where=folder,
        )
    file = read_tensors(weights)
    sidecar = read_sidecar(folder)
    said = []
    if unknown:
        said.append(f"{folder}: fields of {CONFIG_FILE} that are not known here were left out: {', '.join(unknown)}.")
    doubt = integrity(sidecar, file, weights)
    if doubt and sidecar.present:
        said.append(f"{folder}: {doubt}.")
    if sidecar.interrupted:
        said.append(f"{folder}: a save was interrupted; this is the adapter from before it.")
    ours = sidecar.trusts(folder / CONFIG_FILE)
    if sidecar.present and not ours:
        said.append(f"{folder}: {CONFIG_FILE} was edited since the adapter was saved; it is taken as it is.")
    return AdapterFiles(folder, config, file, sidecar, ours, tuple(said))


def alpha_at(files: AdapterFiles, path: str, pattern_path: str | None = None) -> float:
    """Alpha at a site: from `lorakit.json` where the config is the one it was written with, else from the config.

    Args:
        files: What was read.
        path: The site's path on disk.
        pattern_path: Path that patterns are compared with, if it is another.

    Raises:
        AdapterFileError: It follows from a regular expression, which is not run.
    """
    if files.config_is_ours and path in files.sidecar.sites:
        return float(files.sidecar.sites[path]["lora_alpha"])
    try:
        return literal_value(files.config.alpha_pattern, pattern_path or path, files.config.lora_alpha)
    except PatternError as cause:
        raise AdapterFileError(
            f"{files.folder / CONFIG_FILE}: alpha_pattern: {cause}",
            what=cause.what,
            where=files.folder / CONFIG_FILE,
            field="alpha_pattern",
        ) from None


def parameters_meant(config: LoraConfig, path: str) -> tuple[str, ...]:
    """Return the bare parameters that a site on disk may belong to, sorted; none if the module itself is a target.

    The files name modules, not their bare parameters: which tensors are whose follows from the order in which the
    module defines them, and that is known where the model is.

    Args:
        config: The adapter's config.
        path: The site's path on disk.
    """
    module, targets = path.partition(INSIDE)[0], config.target_modules
    if not isinstance(targets, str) and any(names_path(entry, module) for entry in targets or ()):
        return ()
    parts = [entry.rpartition(".") for entry in config.target_parameters or ()]
    found = {f"{module}.{name}" for holder, _, name in parts if not holder or names_path(holder, module)}
    return tuple(sorted(found))


def rank_and_alpha(files: AdapterFiles, path: str, rows: int) -> tuple[int, float | None]:
    """Rank and alpha of a site; where it cannot be known, the rows for the rank and None for alpha.

    Of an adapter that PEFT wrote, a parameter's own rank and alpha are known where the patterns give all parameters
    that may be meant the same.

    Args:
        files: What was read.
        path: The site's path on disk.
        rows: So many rows has its A: the rank, or of experts the rank of all together.
    """
    config = files.config
    known = files.sidecar.sites.get(path) if files.config_is_ours else None
    if known is not None:
        rank = int(known["r"])
        return (rank if rank > 0 and rows % rank == 0 else rows), float(known["lora_alpha"])
    meant = parameters_meant(config, path)
    try:
        ranks = {int(literal_value(config.rank_pattern, name, config.r)) for name in meant} or {rows}
        alphas = {float(literal_value(config.alpha_pattern, name, config.lora_alpha)) for name in meant or [path]}
    except PatternError:
        return rows, None
    fitting = [rank for rank in ranks if rank > 0 and rows % rank == 0]
    if len(fitting) != 1 or len(alphas) != 1:
        return rows, None
    return fitting[0], alphas.pop()
