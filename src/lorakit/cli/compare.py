"""`lorakit compare`: compare two adapters site by site, or several pair by pair."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import NAMES, by_name
from lorakit.cli.early import adapter_folders
from lorakit.errors import UsageError
from lorakit.tables import format_count

if TYPE_CHECKING:
    from lorakit.core import Comparison


def run(
    adapters: Annotated[list[str], Parameter(help=f"Two or more: {NAMES}, of lorakit or PEFT.")],
    *,
    json: console.JsonFlag = False,
) -> None:
    """Compare adapters: the direction, norm and subspaces of their updates.

    Two adapters are compared by module, and more than two pair by pair. The cosine is 1 for updates in the same
    direction, -1 for updates in opposite directions, and near 0 for unrelated updates. The overlap of the output
    subspaces ("writes") or input subspaces ("reads") is the mean squared cosine of their principal angles: 1 for equal
    subspaces, and near 0 for unrelated ones.

    Raises:
        UsageError: Fewer than two adapters are given.
        AdapterFileError: A directory contains no adapter, or a file is damaged.
    """
    if len(adapters) < 2:
        raise UsageError("one adapter was given; pass two or more to compare.", what=adapters, field="adapters")
    folders = [folder for name in adapters for folder in adapter_folders([name]).values()]
    from lorakit import core

    if len(folders) > 2:
        pairs = [_pair(core.compare_folders(*two)) for two in combinations(folders, 2)]
        if json:
            console.emit_json({"adapters": folders, "pairs": pairs})
        else:
            console.say(_pairs_text(pairs))
        return
    comparison = core.compare_folders(*folders)
    if json:
        console.emit_json(
            {**asdict(comparison), "dora": "DoRA" in comparison.in_part, "groups": list(_groups(comparison))}
        )
    else:
        console.say(_text(comparison))


def _pair(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison of two adapters over all their common sites; the overlaps are medians, or None."""
    sites = comparison.sites
    return {
        "names": comparison.names,
        "cosine": comparison.cosine,
        "norms": comparison.norms,
        "sites": len(sites),
        "output_overlap": statistics.median(site.output_overlap for site in sites) if sites else None,
        "input_overlap": statistics.median(site.input_overlap for site in sites) if sites else None,
        "base": comparison.base,
        "in_part": comparison.in_part,
    }


def _pairs_text(pairs: Sequence[dict[str, Any]]) -> str:
    header = ["first", "second", "cosine", "writes", "reads", "sites", "base"]
    rows = [
        [
            *pair["names"],
            f"{pair['cosine']:.4f}",
            *("" if pair[key] is None else f"{pair[key]:.4f}" for key in ("output_overlap", "input_overlap")),
            str(pair["sites"]),
            pair["base"],
        ]
        for pair in pairs
    ]
    titles = dict.fromkeys(title for pair in pairs for title in pair["in_part"])
    notes = [f"{title}: only the low-rank parts are compared" for title in titles]
    legend = "cosine: over all sites; writes, reads: overlap of the output and input subspaces, medians over the sites"
    return "\n".join([console.table(header, rows), legend, *notes])


def _groups(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield statistics of the sites, grouped by the last component of their path; norms and overlaps are medians."""
    for name, members in by_name(comparison.sites, lambda site: site.path.rpartition(".")[2]).items():
        cosines = [site.cosine for site in members]
        yield {
            "module": name,
            "sites": len(members),
            "cosine": {"min": min(cosines), "median": statistics.median(cosines), "max": max(cosines)},
            "norms": [statistics.median(site.norms[which] for site in members) for which in (0, 1)],
            "output_overlap": statistics.median(site.output_overlap for site in members),
            "input_overlap": statistics.median(site.input_overlap for site in members),
        }


def _text(comparison: Comparison) -> str:
    first, second = comparison.names
    lines = [
        f"{first} and {second}: cosine {comparison.cosine:.4f} over all sites",
        f"norms      {comparison.norms[0]:.3g} and {comparison.norms[1]:.3g}",
        f"base       {comparison.base}",
    ]
    for title in comparison.in_part:
        lines.append(f"{title:<10} only the low-rank parts are compared")
    for folder, paths in ((first, comparison.only_first), (second, comparison.only_second)):
        if paths:
            lines.append(f"only in    {folder}: {format_count(len(paths), 'site')}, first {paths[0]}")
    lines = list(map(console.inline, lines))
    header = ["module", "sites", "cosine min", "median", "max", "‖ΔW‖ 1", "‖ΔW‖ 2", "writes", "reads"]
    rows = [_row(group) for group in _groups(comparison)]
    lines += ["", console.table(header, rows) if rows else "no sites in common"]
    if rows:
        lines.append("writes, reads: overlap of the output and input subspaces; medians over the sites")
    return "\n".join(lines)


def _row(group: dict[str, Any]) -> list[str]:
    return [
        group["module"],
        str(group["sites"]),
        *(f"{group['cosine'][key]:.4f}" for key in ("min", "median", "max")),
        *(f"{norm:.3g}" for norm in group["norms"]),
        f"{group['output_overlap']:.4f}",
        f"{group['input_overlap']:.4f}",
    ]
