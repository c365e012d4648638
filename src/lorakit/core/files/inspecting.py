"""Inspect an adapter's files without a model, and report the config, the sites with their norms, and any findings.

A finding is a property that is valid but implausible, or a value that is not finite; loading warns of it or rejects it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.config import LoraConfig, scale
from lorakit.core.files.adapter_folder import AdapterFiles, rank_and_alpha, read_adapter
from lorakit.core.files.tensors import by_site
from lorakit.core.inits import known_init
from lorakit.core.kinds import per_expert
from lorakit.core.model.checks import LARGEST_USUAL_SCALE
from lorakit.core.model.fingerprint import Fingerprint
from lorakit.core.variants import variants_of
from lorakit.durable import JsonObject
from lorakit.errors import OVERRIDE, AdapterFileError
from lorakit.tables import format_some

ZERO, PARTLY_ZERO, NONFINITE = "zero_update", "partly_zero", "nonfinite"
VALUES, SCALE, ALPHA = "large_values", "large_scale", "alpha_not_positive"
PATTERN, INIT = "steep_alpha_pattern", "unknown_init"
"""Kinds of findings."""

LARGEST_USUAL_VALUE = 1e4
"""Larger magnitudes are implausible: in practice, trained factors are below 10 and base weights below 1,000. The
maximum in fp16 is 65,504."""

STEEPEST_USUAL_PATTERN = 100.0
"""A larger ratio of a site's scale to the config's scale is implausible. In published rank and alpha patterns, the
ratio stays below 64, and an alpha pattern that follows the rank pattern does not change the scale."""

ADVICE: Mapping[str, str] = {
    ZERO: "the adapter has no effect there; it was never trained, or training did not change it",
    PARTLY_ZERO: "the adapter has no effect there",
    VALUES: f"trained values are normally below {LARGEST_USUAL_VALUE:g}",
    SCALE: "check lora_alpha, r and the patterns",
    ALPHA: "at zero, the adapter has no effect; below zero, it has the opposite of the trained effect",
}
"""Kind of a finding -> explanation or advice."""


@dataclass(frozen=True)
class Finding:
    """One implausible property of an adapter.

    Attributes:
        kind: "zero_update", "partly_zero", "nonfinite", "large_values", "large_scale",
            "alpha_not_positive", "steep_alpha_pattern" or "unknown_init".
        where: Affected sites, or tensor names for "nonfinite" and "large_values"; empty if the finding concerns the
            whole adapter.
        value: The value at the first entry in `where`, the name of an unknown initialization method, or None.
    """

    kind: str
    where: tuple[str, ...]
    value: float | str | None
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Site:
    """The properties of a site on disk that are known without a model; alpha and scale are None if unknown."""

    path: str
    alpha: float | None
    scale: float | None


def judge(config: LoraConfig, sites: Sequence[Site], largest: Mapping[str, float]) -> tuple[Finding, ...]:
    """Return a finding for each implausible property of an adapter, given the result of `largest_values`."""
    findings = [
        _zero(sites, largest) if all(variant.parts.uses_factors for variant in variants_of(config)) else None,
        _nonfinite(largest),
        _of_tensors(VALUES, "Implausibly large values", largest, lambda v: LARGEST_USUAL_VALUE <= v < math.inf),
        *_scales(config, sites),
        _init(config),
    ]
    return tuple(finding for finding in findings if finding is not None)


def _nonfinite(largest: Mapping[str, float]) -> Finding | None:
    return _of_tensors(NONFINITE, "NaN or infinite values", largest, lambda value: not math.isfinite(value))


def check_finite(folder: Path, largest: Mapping[str, float], allow: Collection[str]) -> None:
    """Raise an AdapterFileError for NaN or infinite values, unless "nonfinite" is allowed."""
    finding = _nonfinite(largest)
    if finding is not None and "nonfinite" not in allow:
        raise AdapterFileError(
            f"{folder}: {finding}",
            advice=f"Use an earlier checkpoint, or {OVERRIDE}.",
            what=finding.where[0],
            where=folder,
            override="nonfinite",
        )


def check_adapter(folder: str | os.PathLike[str]) -> AdapterFiles:
    """Read an adapter's files, and check that its tensors are finite and complete, as far as this needs no model.

    Raises:
        AdapterFileError: A file is missing or damaged, a value is NaN or infinite, a site lacks A or B, or a site that
            `lorakit.json` lists has no tensors.
        NotYetSupported: The adapter needs a feature that is not implemented.
    """
    files = read_adapter(folder)
    check_finite(files.folder, largest_values(files.file.tensors), ())
    sites = by_site(files.file.tensors)
    halves = [path for path, parts in sites.items() if not {"A", "B"} <= parts.keys()]
    missing = [path for path in files.sidecar.sites if path not in sites]
    if halves or missing or not files.file.tensors:
        found = f"A or B is missing at {format_some(halves, 1)}" if halves else "the weights file has no tensors"
        found = f"sites without tensors: {format_some(missing, 1)}" if missing else found
        text = f"{files.folder}: the adapter is incomplete: {found}. Copy or train it again."
        raise AdapterFileError(text, what=next(iter([*missing, *halves]), "tensors"), where=files.folder)
    return files


def implausible(folder: str | Path, findings: Sequence[Finding], may_be_zero: bool = False) -> tuple[str, ...]:
    """Return a tuple with one message that lists all findings, or an empty tuple if there are no findings.

    A zero update is plausible if `may_be_zero`, and at only some sites: experts that no token reached, or weights that
    did not change before an extraction. `inspect_adapter` still lists them.
    """
    ignored = {PARTLY_ZERO, ZERO} if may_be_zero else {PARTLY_ZERO}
    messages = [str(finding) for finding in findings if finding.kind not in ignored]
    return (f"{folder}: implausible: {' '.join(messages)}",) if messages else ()


def largest_values(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return a dict from tensor name to the tensor's largest magnitude (see `largest_value`)."""
    return {name: largest_value(tensor) for name, tensor in tensors.items()}


def largest_value(tensor: Tensor) -> float:
    """Return the largest magnitude in a tensor of any shape: NaN if it contains NaN, 0 for empty or integer tensors."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(low.abs(), high.abs()))


def _zero(sites: Sequence[Site], largest: Mapping[str, float]) -> Finding | None:
    parts = by_site(largest)
    pairs = [(site.path, parts.get(site.path, {})) for site in sites]
    zero = [(path, 0.0) for path, part in pairs if 0 in (part.get("A"), part.get("B")) and not part.get("bias")]
    if not zero:
        return None
    many = "all" if len(zero) == len(sites) else f"{len(zero)} of {len(sites)}"
    return _finding(ZERO if many == "all" else PARTLY_ZERO, f"B·A is zero at {many} sites", zero)


def _of_tensors(kind: str, what: str, largest: Mapping[str, float], bad: Callable[[float], bool]) -> Finding | None:
    places = [(name, value) for name, value in largest.items() if bad(value)]
    return _finding(kind, f"{what} (tensors: {len(places)})", places) if places else None


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
    steepness = f"alpha_pattern makes the scale at least {STEEPEST_USUAL_PATTERN:g} times that of the config"
    sorts = (
        (ALPHA, "lora_alpha, and therefore the scale, is zero or negative", alphas),
        (SCALE, f"The scale is {LARGEST_USUAL_SCALE:g} or more", large),
        (PATTERN, steepness, steep),
    )
    return [_finding(kind, f"{what} (sites: {len(bad)})", bad) for kind, what, bad in sorts if bad]


def _init(config: LoraConfig) -> Finding | None:
    if known_init(config) is not None:
        return None
    name = str(config.init_lora_weights)
    text = f"init_lora_weights is {name!r}, which is unknown and ignored; if it changes the base, the adapter needs it."
    return Finding(INIT, (), name, text)


def _finding(kind: str, what: str, places: Sequence[tuple[str, float]]) -> Finding:
    """Return a finding that names the first few entries in `places`, which holds (site or tensor name, value) pairs."""
    shown = [name if kind in (ZERO, PARTLY_ZERO) else f"{name} ({value:g})" for name, value in places]
    advice = f": {ADVICE[kind]}" if kind in ADVICE else ""
    text = f"{what}, first {format_some(shown)}{advice}."
    return Finding(kind, tuple(name for name, _ in places), places[0][1], text)


@dataclass(frozen=True)
class SiteSummary:
    """One site of an adapter on disk.

    Attributes:
        r: Rank; for several experts in one parameter, the rank of each expert.
        lora_alpha: Alpha, or None if it depends on a regular expression.
        scale: Effective scale, or None if alpha is None.
        norm: Frobenius norm of scale·B·A (of B·A if the scale is unknown).
        experts: Number of experts whose factors are in A and B; 0 for a single matrix.
    """

    path: str
    r: int
    lora_alpha: float | None
    scale: float | None
    in_features: int
    out_features: int
    norm: float
    experts: int = 0


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter on disk.

    Attributes:
        parameters: Number of elements in all tensors.
        findings: Messages about what looks wrong; empty for a healthy adapter.
        judged: Findings about values, scales and the initialization method; `findings` includes their messages.
    """

    folder: str
    config: LoraConfig
    sites: tuple[SiteSummary, ...]
    parameters: int
    weights_bytes: int
    weights_sha256: str
    base: Fingerprint | None
    facts: JsonObject
    findings: tuple[str, ...]
    judged: tuple[Finding, ...] = ()


def inspect_adapter(folder: str | os.PathLike[str]) -> AdapterSummary:
    """Read an adapter's files and report zero updates, NaN values, implausible scales and changed files.

    Raises:
        AdapterFileError: A file is missing or damaged.
        NotYetSupported: The adapter needs a feature that is not implemented.
    """
    files = read_adapter(folder)
    tensors = files.file.tensors
    pairs, odd_paths = _pairs(tensors)
    sites = tuple(_site(files, path, A, B) for path, (A, B) in pairs.items())
    judged = judge(files.config, [Site(s.path, s.lora_alpha, s.scale) for s in sites], largest_values(tensors))
    findings = [*files.warnings, *map(str, judged), *_unreadable(sites, odd_paths)]
    return AdapterSummary(
        folder=str(folder),
        config=files.config,
        sites=sites,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        weights_bytes=files.file.size_bytes,
        weights_sha256=files.file.sha256,
        base=files.sidecar.base,
        facts=files.sidecar.facts,
        findings=tuple(findings),
        judged=judged,
    )


def judge_files(files: AdapterFiles, allow: Collection[str] = ()) -> tuple[Finding, ...]:
    """Return the findings of `AdapterSummary.judged`; an AdapterFileError for NaN or infinity, unless allowed."""
    pairs, _ = _pairs(files.file.tensors)
    sites = [_known_site(files, path, A)[1] for path, (A, _) in pairs.items()]
    largest = largest_values(files.file.tensors)
    check_finite(files.folder, largest, allow)
    return judge(files.config, sites, largest)


def delta_norm(A: Tensor, B: Tensor) -> float:
    """Return the Frobenius norm of B (out, r) · A (r, in), which is √ trace((BᵀB)(AAᵀ)).   [docs/math.md (9)]"""
    A, B = A.double().flatten(1), B.double().flatten(1)
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Return each site's A (r, in, …) and B (out, r, …), and the sites where A or B is missing or the ranks differ."""
    pairs, odd_paths = {}, []
    for path, parts in sorted(by_site(tensors).items()):
        A, B = parts.get("A"), parts.get("B")
        if A is not None and B is not None and A.ndim >= 2 and B.ndim >= 2 and A.shape[0] == B.shape[1] >= 1:
            pairs[path] = (A, B)
        else:
            odd_paths.append(path)
    return pairs, odd_paths


def _known_site(files: AdapterFiles, path: str, A: Tensor) -> tuple[int, Site]:
    """Given a site's A (r, in, …), return the site's rank and the properties that are known without a model."""
    r, alpha = rank_and_alpha(files, path, int(A.shape[0]))
    return r, Site(path, alpha, None if alpha is None else scale(r, alpha, files.config.use_rslora))


def _site(files: AdapterFiles, path: str, A: Tensor, B: Tensor) -> SiteSummary:
    r, site = _known_site(files, path, A)
    experts = A.shape[0] // r if A.shape[0] > r and A.ndim == 2 else 0
    pairs = [(A, B)]
    if experts:
        pairs = list(zip(*per_expert(A, B, experts), strict=True))
    norm = math.sqrt(sum(delta_norm(*pair) ** 2 for pair in pairs)) * (1.0 if site.scale is None else abs(site.scale))
    return SiteSummary(path, r, site.alpha, site.scale, int(A.shape[1]), int(B.shape[0]), norm, experts)


def _unreadable(sites: Sequence[SiteSummary], odd_paths: Sequence[str]) -> list[str]:
    """Return messages about sites with an unknown scale or mismatched factors, or about a file without sites."""
    messages = []
    unknown = [s.path for s in sites if s.scale is None]
    if unknown:
        messages.append(f"Some scales depend on a regular expression, which is not run (sites: {len(unknown)}).")
    if odd_paths:
        messages.append(f"A or B is missing, or their ranks differ (sites: {len(odd_paths)}), first {odd_paths[0]}.")
    if not sites:
        messages.append("The file contains no LoRA sites.")
    return messages
