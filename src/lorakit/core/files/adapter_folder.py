"""An adapter's directory, read and verified without a model; and findings on its tensors and config.

Findings are what is valid but implausible, and values that are not finite: loading warns of them or raises an error,
and inspecting lists the same in the same words.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.config import CONFIG_FILE, LoraConfig, read_config, scale
from lorakit.core.files.sidecar import WEIGHTS_FILE, Sidecar, identities, integrity, read_sidecar
from lorakit.core.files.tensor_file import TensorFile, read_tensors
from lorakit.core.files.tensor_names import parse
from lorakit.core.inits import init_named
from lorakit.core.model.checks import LARGEST_USUAL_SCALE
from lorakit.core.model.index import INSIDE
from lorakit.errors import OVERRIDE, AdapterFileError, ConfigError, PatternError
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


ZERO, PARTLY_ZERO, NONFINITE, VALUES, SCALE, ALPHA, PATTERN, INIT = (
    "zero_update",
    "partly_zero",
    "nonfinite",
    "large_values",
    "large_scale",
    "alpha_not_positive",
    "steep_alpha_pattern",
    "unknown_init",
)
"""The kinds of findings."""

LARGEST_USUAL_VALUE = 1e4
"""From this on a number is implausible. Trained factors are below 10 and base weights below 1,000 in practice, and
fp16 ends at 65,504."""

STEEPEST_USUAL_PATTERN = 100.0
"""From this ratio on a site's scale is implausible next to the scale of the config. Published patterns of ranks and
alphas stay below 64, and a pattern that follows the rank changes no scale."""

ADVICE: Mapping[str, str] = {
    ZERO: "the adapter does nothing there; it was never trained, or training did not change it",
    PARTLY_ZERO: "the adapter does nothing there",
    VALUES: f"trained numbers are below {LARGEST_USUAL_VALUE:g}",
    SCALE: "check lora_alpha, r and the patterns",
    ALPHA: "at zero the adapter does nothing, below it does the opposite of what it was trained for",
}
"""Kind of a finding -> its meaning."""

NAMED = 3
"""The number of sites or tensors that a finding names."""


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        kind: What it is: "zero_update", "partly_zero", "nonfinite", "large_values", "large_scale",
            "alpha_not_positive", "steep_alpha_pattern" or "unknown_init".
        where: Sites, or names of tensors for "nonfinite" and "large_values"; empty for the whole adapter.
        value: The value of the first of them, or None.
        text: The finding in words.
    """

    kind: str
    where: tuple[str, ...]
    value: float | str | None
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Site:
    """One site as it is judged.

    Attributes:
        path: Its path on disk.
        alpha: Its alpha, or None if it is unknown.
        scale: Its effective scale, or None likewise.
    """

    path: str
    alpha: float | None
    scale: float | None


def judge(config: LoraConfig, sites: Sequence[Site], largest: Mapping[str, float]) -> tuple[Finding, ...]:
    """Judge an adapter.

    Args:
        config: Its config.
        sites: Its sites.
        largest: Name on disk -> largest magnitude in that tensor, as `largest_values` gives it.

    Returns:
        What looks wrong; empty for a plausible adapter.
    """
    found = [
        _zero(sites, largest),
        nonfinite(largest),
        _of_tensors(VALUES, "Implausibly large numbers", largest, lambda v: LARGEST_USUAL_VALUE <= v < math.inf),
        *_scales(config, sites),
        _init(config),
    ]
    return tuple(finding for finding in found if finding is not None)


def nonfinite(largest: Mapping[str, float]) -> Finding | None:
    """Return the finding of NaN and infinite numbers, or None if there are none.

    Args:
        largest: As for `judge`.
    """
    return _of_tensors(NONFINITE, "NaN or infinite numbers", largest, lambda value: not math.isfinite(value))


def not_finite(folder: Path, finding: Finding) -> AdapterFileError:
    """Return the error that a finding of NaN or infinite numbers is, unless it is allowed."""
    return AdapterFileError(
        f"{folder}: {finding}",
        advice=f"Take an earlier checkpoint, or {OVERRIDE}.",
        what=next(iter(finding.where), None),
        where=folder,
        override="nonfinite",
    )


def implausible(folder: str | Path, findings: Sequence[Finding], may_be_zero: bool = False) -> tuple[str, ...]:
    """Return one message that names all findings, or none if there are none.

    Some zero sites among others are not a reason for a warning: experts that no token reached and what
    is extracted from a model that changed in part have such sites. Inspecting lists them.

    Args:
        folder: The adapter's folder.
        findings: As `judge` gives them.
        may_be_zero: The adapter may do nothing: it is going to be trained, or is one of several.
    """
    passed = {PARTLY_ZERO, ZERO} if may_be_zero else {PARTLY_ZERO}
    told = [str(finding) for finding in findings if finding.kind not in passed]
    return (f"{folder}: implausible: {' '.join(told)}",) if told else ()


def largest_values(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return name -> `largest_value` of tensors, each (…)."""
    return {name: largest_value(tensor) for name, tensor in tensors.items()}


def largest_value(tensor: Tensor) -> float:
    """Return the largest magnitude in a tensor of any shape: NaN if it holds NaN, 0 if it is empty or of integers."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(low.abs(), high.abs()))


def _zero(sites: Sequence[Site], largest: Mapping[str, float]) -> Finding | None:
    parts: dict[str, dict[str, float]] = {}
    for name, value in largest.items():
        key = parse(name)
        if key is not None:
            parts.setdefault(key.path, {})[key.part] = value
    held = [parts.get(site.path, {}) for site in sites]
    pairs = [(site.path, part) for site, part in zip(sites, held, strict=True) if {"A", "B"} <= part.keys()]
    zero = [(path, 0.0) for path, part in pairs if 0 in (part["A"], part["B"]) and not part.get("bias")]
    if not zero:
        return None
    many = "all" if len(zero) == len(sites) else f"{len(zero)} of {len(sites)}"
    return _finding(ZERO if many == "all" else PARTLY_ZERO, f"B·A is zero at {many} sites", zero)


def _of_tensors(kind: str, what: str, largest: Mapping[str, float], bad: Callable[[float], bool]) -> Finding | None:
    found = [(name, value) for name, value in largest.items() if bad(value)]
    return _finding(kind, f"{what} in {len(found)} tensors", found) if found else None


def _scales(config: LoraConfig, sites: Sequence[Site]) -> list[Finding]:
    usual = abs(scale(config.r, config.lora_alpha, config.use_rslora))
    known = [(site.path, site.alpha, site.scale) for site in sites if site.alpha is not None and site.scale is not None]
    alphas = [(path, alpha) for path, alpha, _ in known if not alpha > 0]
    large = [(path, value) for path, _, value in known if not abs(value) < LARGEST_USUAL_SCALE]
    steep = [
        (path, value)
        for path, alpha, value in known
        if config.alpha_pattern and alpha != config.lora_alpha and abs(value) >= STEEPEST_USUAL_PATTERN * usual > 0
    ]
    steepness = f"alpha_pattern makes the scale {STEEPEST_USUAL_PATTERN:g} times that of the config or more"
    sorts = (
        (ALPHA, "lora_alpha, and so the scale, is zero or negative", alphas),
        (SCALE, f"The scale is {LARGEST_USUAL_SCALE:g} or more", large),
        (PATTERN, steepness, steep),
    )
    return [_finding(kind, f"{what} at {len(bad)} sites", bad) for kind, what, bad in sorts if bad]


def _init(config: LoraConfig) -> Finding | None:
    try:
        init_named(config.init_lora_weights)
    except ConfigError:
        name = str(config.init_lora_weights)
        text = (
            f"init_lora_weights is {name!r}, which is not known here and is ignored: if that init changes the base, "
            "the adapter does not fit an unchanged one."
        )
        return Finding(INIT, (), name, text)
    return None


def _finding(kind: str, what: str, found: Sequence[tuple[str, float]]) -> Finding:
    """Return a finding that names the first of what was found: pairs of a site or tensor and its value."""
    shown = [name if kind in (ZERO, PARTLY_ZERO) else f"{name} ({value:g})" for name, value in found[:NAMED]]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    advice = f": {ADVICE[kind]}" if kind in ADVICE else ""
    text = f"{what}, first {', '.join(shown)}{more}{advice}."
    return Finding(kind, tuple(name for name, _ in found), found[0][1], text)
