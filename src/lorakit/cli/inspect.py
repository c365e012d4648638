"""`lorakit inspect`: show the health, config, sites and norms of adapters; the base is not loaded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import NAMES, by_name
from lorakit.cli.early import adapter_folders
from lorakit.durable import as_object
from lorakit.errors import UsageError
from lorakit.tables import format_bytes, format_count

if TYPE_CHECKING:
    from lorakit.core import AdapterSummary, Fingerprint
    from lorakit.durable import JsonValue

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
    adapters: Annotated[list[str], Parameter(help=f"{NAMES}, of lorakit or PEFT.")],
    *,
    brief: Annotated[bool, Parameter(negative=(), help="Show only what differs between several adapters.")] = False,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> int:
    """Show the health, config, sites and norms of adapters; the base is not loaded.

    The exit code is 0 if all adapters are healthy, and 1 if one has problems or cannot be read. --verbose adds files,
    hashes and the base's fingerprint.

    Raises:
        UsageError: --brief is given with a single adapter.
        AdapterFileError: A directory contains no adapter, or a file is damaged.
    """
    if brief and len(adapters) < 2:
        raise UsageError("--brief compares several adapters, but one was given; omit it.", what=adapters, field="brief")
    folders = adapter_folders(adapters).values()
    from lorakit.core import inspect_adapter

    inspected = [(inspect_adapter(folder), _file_sizes(Path(folder))) for folder in folders]
    if brief:
        _show_differences([summary for summary, _ in inspected], json)
    elif json:
        documents = [as_dict(summary, sizes) for summary, sizes in inspected]
        console.emit_json(documents if len(documents) > 1 else documents[0])
    else:
        console.say("\n\n".join(_text(summary, sizes, verbose) for summary, sizes in inspected))
    return 1 if any(summary.findings for summary, _ in inspected) else 0


def _file_sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def differing(summaries: Sequence[AdapterSummary]) -> dict[str, dict[str, JsonValue]]:
    """Return the properties and config fields in which adapters differ: field -> adapter directory -> value."""
    values = {summary.folder: _properties(summary) for summary in summaries}
    names = dict.fromkeys(name for own in values.values() for name in own)
    table = {name: {folder: own.get(name) for folder, own in values.items()} for name in names}
    return {
        name: row for name, row in table.items() if any(value != row[summaries[0].folder] for value in row.values())
    }


def _properties(summary: AdapterSummary) -> dict[str, JsonValue]:
    return {
        "healthy": not summary.findings,
        "base": summary.config.base_model_name_or_path or summary.facts.get("base_name"),
        "parameters": summary.parameters,
        "sites": len(summary.sites),
        "norm": math.sqrt(sum(site.norm**2 for site in summary.sites)),
        "eval_loss": as_object(summary.facts.get("training")).get("eval_loss"),
        **{name: value for name, value in summary.config.as_json().items() if name != "base_model_name_or_path"},
    }


def _show_differences(summaries: Sequence[AdapterSummary], as_json: bool) -> None:
    fields = differing(summaries)
    if as_json:
        console.emit_json(fields)
        return
    rows = []
    for name, row in fields.items():
        titles = [name] + [""] * (len(row) - 1)
        rows += [[title, folder, _brief_value(row[folder])] for title, folder in zip(titles, row, strict=True)]
    console.say(console.table(["differs in", "adapter", "value"], rows) if rows else "no differences")


def _brief_value(value: JsonValue) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_dict(summary: AdapterSummary, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the report as plain JSON values; `sizes` has the size of each file in bytes."""
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
        "groups": list(groups(summary)),
        "sites": [asdict(site) for site in summary.sites],
    }


def groups(summary: AdapterSummary) -> Iterator[dict[str, Any]]:
    """Yield statistics of the sites, grouped by the last component of their path, in order of first occurrence.

    Yields:
        {"module", "sites", "shapes", "ranks", "experts", "scales", "norm": {"min", "median", "max"}}.
    """
    for name, members in by_name(summary.sites, lambda site: _module(site.path)).items():
        norms = [site.norm for site in members]
        yield {
            "module": name,
            "sites": len(members),
            "shapes": sorted({(site.out_features, site.in_features) for site in members}),
            "ranks": sorted({site.r for site in members}),
            "experts": sorted({site.experts for site in members}),
            "scales": sorted({site.scale for site in members if site.scale is not None}),
            "norm": {"min": min(norms), "median": statistics.median(norms), "max": max(norms)},
        }


def _module(path: str) -> str:
    """Return the last component of a site's path, keeping any `.base_layer` suffix and everything after it."""
    module, inside, deeper = path.partition(".base_layer")
    return module.rpartition(".")[2] + inside + deeper


def _text(summary: AdapterSummary, sizes: dict[str, int], verbose: bool) -> str:
    config = summary.config
    shown = [f"{name}={_value(getattr(config, name))}" for name in _CONFIG_SHOWN]
    shown += [f"{n}={_value(getattr(config, n))}" for n in _CONFIG_IF_SET if getattr(config, n, None)]
    about = [
        f"adapter    {summary.parameters:,} parameters at {format_count(len(summary.sites), 'site')}, "
        f"{format_bytes(summary.weights_bytes)}",
        f"config     {', '.join(shown)}",
        f"base       {_base(summary)}",
    ]
    if verbose:
        about += [f"samples    {_fingerprint(summary.base)}"] if summary.base is not None else []
        about += [
            f"files      {', '.join(f'{name} {format_bytes(size)}' for name, size in sizes.items())}",
            f"weights    SHA-256 {summary.weights_sha256}",
        ]
    lines = [*_verdict(summary), *map(console.inline, about), ""]
    if not summary.sites:
        return "\n".join([*lines, "no sites"])
    header = ["module", "sites", "out × in", "r", "scale", "‖ΔW‖ min", "median", "max"]
    return "\n".join([*lines, console.table(header, [_row(group) for group in groups(summary)])])


def _verdict(summary: AdapterSummary) -> list[str]:
    folder = console.inline(summary.folder)
    if not summary.findings:
        return [f"{folder}: healthy (values finite, every B nonzero, scales in range)"]
    return [
        f"{folder}: {format_count(len(summary.findings), 'problem')}",
        *(f"  - {console.inline(sentence)}" for sentence in summary.findings),
        "",
    ]


def _row(group: dict[str, Any]) -> list[str]:
    norm = group["norm"]
    return [
        group["module"],
        str(group["sites"]),
        (f"{_span(group['experts'])} × " if any(group["experts"]) else "")
        + ", ".join(f"{out} × {into}" for out, into in group["shapes"]),
        _span(group["ranks"]),
        _span(group["scales"]) or "?",
        *(f"{norm[key]:.3g}" for key in ("min", "median", "max")),
    ]


def _span(values: Sequence[float]) -> str:
    if len(values) > 2:
        return f"{values[0]:g} to {values[-1]:g}"
    return ", ".join(f"{value:g}" for value in values)


def _base(summary: AdapterSummary) -> str:
    from lorakit.hub import base_named

    base_name = summary.facts.get("base_name")
    named = base_named(summary.config.base_model_name_or_path, base_name) or base_name or "no name"
    if summary.base is None:
        return f"{named}; no fingerprint, so another base with the same shapes would not be detected"
    known = summary.base
    return f"{named} ({known.architecture}, {known.parameters:,} parameters, {known.dtype})"


def _fingerprint(known: Fingerprint) -> str:
    files = f", {format_count(len(known.files), 'weight file')}" if known.files else ""
    return (
        f"fingerprint {known.names_sha256[:12]}, {format_count(len(known.samples), 'tensor')} sampled, "
        f"{known.vocabulary:,} tokens{files}"
    )


def _value(value: Collection[str] | str | float | None) -> str:
    if isinstance(value, (set, frozenset, list, tuple)):
        return "[" + ", ".join(sorted(map(str, value))) + "]"
    return str(getattr(value, "value", value))
