"""Judge an adapter's numbers and config: what is valid but implausible, and what is not a usable number.

Loading warns of what is found or raises an error, and inspecting lists the same in the same words. It knows nothing
of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.config import LoraConfig, scale
from lorakit.core.files.tensor_names import parse
from lorakit.core.inits import init_named
from lorakit.core.model.checks import LARGEST_USUAL_SCALE
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
