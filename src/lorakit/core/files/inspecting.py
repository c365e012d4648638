"""Look into an adapter's files without a model: config, sites, how strong each is, and what looks wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakit.config import LoraConfig, scale
from lorakit.core.files.adapter_folder import (
    NONFINITE,
    AdapterFiles,
    Finding,
    Site,
    judge,
    largest_values,
    not_finite,
    rank_and_alpha,
    read_adapter,
)
from lorakit.core.files.tensor_names import parse
from lorakit.core.kinds import WeightSpec, per_expert
from lorakit.core.model.fingerprint import Fingerprint
from lorakit.durable import JsonObject


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
