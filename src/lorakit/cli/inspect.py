"""`lorakit inspect`: what is in an adapter, without loading its base."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import refuse_run_folder

if TYPE_CHECKING:
    from lorakit.core import AdapterSummary
    from lorakit.core.files.inspecting import SiteSummary

_CONFIG_SHOWN = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type")
_CONFIG_IF_SET = (
    "target_parameters",
    "layer_replication",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
)


def run(
    adapter: Annotated[
        str, Parameter(help="Directory of an adapter, of lorakit or PEFT. Exit code 1: something looks wrong.")
    ],
    *,
    json: console.JsonFlag = False,
) -> int:
    """What is in an adapter: config, sites, how strong each is, health, its base. The base is not loaded.

    Exit code: 0 healthy, 1 with findings or where the adapter cannot be read; so a script can ask before it uses one.
    """
    from lorakit.core import inspect_adapter

    refuse_run_folder(adapter)
    summary = inspect_adapter(adapter)
    sizes = {path.name: path.stat().st_size for path in sorted(Path(adapter).iterdir()) if path.is_file()}
    if json:
        console.emit_json(as_dict(summary, sizes))
    else:
        console.say(_text(summary, sizes))
    return 1 if summary.findings else 0


def as_dict(summary: AdapterSummary, sizes: dict[str, int]) -> dict[str, Any]:
    """The report as plain JSON values.

    Args:
        summary: What was found.
        sizes: Size in bytes of each file.
    """
    return {
        "folder": summary.folder,
        "healthy": not summary.findings,
        "findings": list(summary.findings),
        "config": summary.config.as_json(),
        "parameters": summary.parameters,
        "weights_sha256": summary.weights_sha256,
        "base": None if summary.base is None else summary.base.as_dict(),
        "facts": summary.facts,
        "files": sizes,
        "groups": [group for _, group in groups(summary.sites)],
        "sites": [asdict(site) for site in summary.sites],
    }


def groups(sites: Sequence[SiteSummary]) -> list[tuple[str, dict[str, Any]]]:
    """Sites by the last word of their path, in the order they come, with what they have in common.

    Args:
        sites: Sites of an adapter.

    Returns:
        Name and {"module", "sites", "shapes", "ranks", "experts", "scales", "norm": {"min", "median", "max"}}.
    """
    by_name: dict[str, list[SiteSummary]] = {}
    for site in sites:
        module, inside, deeper = site.path.partition(".base_layer")
        by_name.setdefault(module.rpartition(".")[2] + inside + deeper, []).append(site)
    return [(name, _group(name, members)) for name, members in by_name.items()]


def _group(name: str, members: list[SiteSummary]) -> dict[str, Any]:
    norms = [site.norm for site in members]
    return {
        "module": name,
        "sites": len(members),
        "shapes": sorted({(site.out_features, site.in_features) for site in members}),
        "ranks": sorted({site.r for site in members}),
        "experts": sorted({site.experts for site in members}),
        "scales": sorted({site.scale for site in members if site.scale is not None}),
        "norm": {"min": min(norms), "median": statistics.median(norms), "max": max(norms)},
    }


def _text(summary: AdapterSummary, sizes: dict[str, int]) -> str:
    config = summary.config
    shown = [f"{name}={_value(getattr(config, name))}" for name in _CONFIG_SHOWN]
    shown += [f"{n}={_value(getattr(config, n))}" for n in _CONFIG_IF_SET if getattr(config, n, None)]
    files = ", ".join(f"{name} {console.bytes_text(size)}" for name, size in sizes.items())
    lines = [
        f"{summary.folder}: {summary.parameters:,} parameters at {len(summary.sites)} sites",
        f"config     {', '.join(shown)}",
        f"base       {_base(summary)}",
        f"files      {files}",
        f"weights    SHA-256 {summary.weights_sha256}",
        "",
        console.table(
            ["module", "sites", "out × in", "r", "scale", "‖ΔW‖ min", "median", "max"],
            [_row(group) for _, group in groups(summary.sites)],
        )
        if summary.sites
        else "no sites",
        "",
    ]
    if summary.findings:
        lines += ["findings", *(f"  - {sentence}" for sentence in summary.findings)]
    else:
        lines.append("healthy: all numbers finite, every site trained, scales as usual")
    return "\n".join(lines)


def _row(group: dict[str, Any]) -> list[str]:
    norm = group["norm"]
    return [
        group["module"],
        str(group["sites"]),
        _experts(group["experts"]) + ", ".join(f"{out} × {into}" for out, into in group["shapes"]),
        _span(group["ranks"]),
        _span(group["scales"]) or "?",
        *(f"{norm[key]:.3g}" for key in ("min", "median", "max")),
    ]


def _experts(counts: Sequence[int]) -> str:
    return f"{_span(counts)} × " if any(counts) else ""


def _span(values: Sequence[float]) -> str:
    if len(values) > 2:
        return f"{values[0]:g} to {values[-1]:g}"
    return ", ".join(f"{value:g}" for value in values)


def _base(summary: AdapterSummary) -> str:
    named = summary.config.base_model_name_or_path or summary.facts.get("base_name") or "no name"
    if summary.base is None:
        return f"{named}; no fingerprint, so another base of the same shapes would not be noticed"
    known = summary.base
    files = f", {len(known.files)} weight files" if known.files else ""
    return (
        f"{named}; fingerprint {known.architecture}, {known.parameters:,} parameters, {known.vocabulary:,} tokens, "
        f"{known.dtype}, {known.names_sha256[:12]}, {len(known.samples)} tensors sampled{files}"
    )


def _value(value: Any) -> str:
    if isinstance(value, (set, frozenset, list, tuple)):
        return "[" + ", ".join(sorted(map(str, value))) + "]"
    return str(getattr(value, "value", value))
