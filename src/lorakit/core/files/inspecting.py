"""Inspect an adapter's files without a model: config, sites, the norm of each, and findings.

Findings are what is valid but implausible, and values that are not finite: loading warns of them or raises an error,
and inspecting lists the same messages.
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
from lorakit.core.files.tensor_names import parse
from lorakit.core.inits import init_named
from lorakit.core.kinds import WeightSpec, per_expert
from lorakit.core.model.checks import LARGEST_USUAL_SCALE
from lorakit.core.model.fingerprint import Fingerprint
from lorakit.durable import JsonObject
from lorakit.errors import OVERRIDE, AdapterFileError, ConfigError

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


@dataclass(frozen=True)
class SiteSummary:
    """One site of an adapter on disk.

    Attributes:
        path: Where it sits.
        r: Rank; of experts in one parameter, that of each.
        lora_alpha: Alpha, or None where a pattern from the file is not a plain name.
        scale: Effective scale, or None likewise.
        in_features: Columns of A.
        out_features: Rows of B.
        norm: Frobenius norm of scale·B·A (without scale where that is unknown).
        experts: So many matrices share A and B; 0 where it is one.
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
        folder: Where.
        config: Its config.
        sites: Its sites, sorted.
        parameters: Numbers it holds.
        weights_bytes: Size of the weights file.
        weights_sha256: Its SHA-256.
        base: Fingerprint of its base, or None.
        facts: What `lorakit.json` says besides.
        findings: Sentences about what looks wrong; empty for a healthy adapter.
        judged: The findings about its numbers and scales, as loading warns of them; each is in `findings` too.
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
    """Read an adapter's files and judge its health.

    Args:
        folder: A folder that PEFT or lorakit wrote.

    Returns:
        The summary; `findings` names zero B, NaN, odd scales and files that changed.

    Raises:
        AdapterFileError: A file is missing or damaged.
        NotYetSupported: The adapter needs what is not built yet.
    """
    files = read_adapter(folder)
    tensors = files.file.tensors
    pairs = _by_site(tensors)
    whole = {path: parts for path, parts in sorted(pairs.items()) if _is_pair(parts)}
    sites = tuple(_site(files, path, parts["A"], parts["B"]) for path, parts in whole.items())
    judged = judge(files.config, [Site(s.path, s.lora_alpha, s.scale) for s in sites], largest_values(tensors))
    findings = [*files.warnings, *map(str, judged), *_unreadable(sites, pairs)]
    return AdapterSummary(
        folder=str(folder),
        config=files.config,
        sites=sites,
        parameters=sum(tensor.numel() for tensor in files.file.tensors.values()),
        weights_bytes=files.file.size_bytes,
        weights_sha256=files.file.sha256,
        base=files.sidecar.base,
        facts=files.sidecar.facts,
        findings=tuple(findings),
        judged=judged,
    )


def judge_files(files: AdapterFiles, allow: Collection[str] = ()) -> tuple[Finding, ...]:
    """Judge an adapter whose numbers are used without `load_adapter`.

    Args:
        files: What was read.
        allow: Checks to override: "nonfinite".

    Returns:
        What looks wrong, in the words of `inspect_adapter`; empty for a plausible adapter.

    Raises:
        AdapterFileError: It holds NaN or infinite numbers.
    """
    whole = {path: parts["A"] for path, parts in _by_site(files.file.tensors).items() if _is_pair(parts)}
    known = [(path, *rank_and_alpha(files, path, int(A.shape[0]))) for path, A in sorted(whole.items())]
    rslora = files.config.use_rslora
    sites = [Site(path, alpha, None if alpha is None else scale(r, alpha, rslora)) for path, r, alpha in known]
    found = judge(files.config, sites, largest_values(files.file.tensors))
    bad = [finding for finding in found if finding.kind == NONFINITE]
    if bad and "nonfinite" not in allow:
        raise not_finite(files.folder, bad[0])
    return found


def _by_site(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return path of a site -> part -> tensor, of what the file holds."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key = parse(name)
        if key is not None:
            pairs.setdefault(key.path, {})[key.part] = tensor
    return pairs


def delta_norm(A: Tensor, B: Tensor) -> float:
    """Frobenius norm of B·A without the product: √ trace((BᵀB)(AAᵀ)).   [docs/math.md (9)]

    Args:
        A: (r, in).
        B: (out, r).
    """
    A, B = A.double().flatten(1), B.double().flatten(1)
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def _is_pair(parts: dict[str, Tensor]) -> bool:
    """Whether A (r, in, …) and B (out, r, …) are both there, with one rank of at least 1."""
    if not {"A", "B"} <= set(parts):
        return False
    A, B = parts["A"], parts["B"]
    return A.ndim >= 2 and B.ndim >= 2 and A.shape[0] == B.shape[1] >= 1


def _site(files: AdapterFiles, path: str, A: Tensor, B: Tensor) -> SiteSummary:
    r, alpha = rank_and_alpha(files, path, int(A.shape[0]))
    experts = A.shape[0] // r if A.shape[0] > r and A.ndim == 2 else 0
    effective = None if alpha is None else scale(r, alpha, files.config.use_rslora)
    pairs = [(A, B)]
    if experts:
        slot = WeightSpec("", int(B.shape[0]), int(A.shape[1]), experts)
        pairs = list(zip(*per_expert(slot, A, B), strict=True))
    norm = math.sqrt(sum(delta_norm(*pair) ** 2 for pair in pairs)) * (1.0 if effective is None else abs(effective))
    return SiteSummary(path, r, alpha, effective, int(A.shape[1]), int(B.shape[0]), norm, experts)


def _unreadable(sites: Sequence[SiteSummary], pairs: Mapping[str, dict[str, Tensor]]) -> list[str]:
    """Return what the files do not tell, in words."""
    found = []
    unknown = [s.path for s in sites if s.scale is None]
    if unknown:
        found.append(f"The scale of {len(unknown)} sites follows from a regular expression, which is not run.")
    odd_pairs = [path for path, parts in pairs.items() if not _is_pair(parts)]
    if odd_pairs:
        found.append(
            f"A or B is missing, or they do not fit together, at {len(odd_pairs)} sites, first {odd_pairs[0]}."
        )
    if not sites:
        found.append("There are no LoRA sites in the file.")
    return found
