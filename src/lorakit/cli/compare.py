"""`lorakit compare`: compare two adapters site by site."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.early import check_adapters

if TYPE_CHECKING:
    from lorakit.core import Comparison
    from lorakit.core.operations.comparing import SiteComparison


def run(
    first: Annotated[str, Parameter(help="First adapter directory, of lorakit or PEFT.")],
    second: Annotated[str, Parameter(help="Second adapter directory.")],
    *,
    json: console.JsonFlag = False,
) -> None:
    """Compare two adapters: direction and strength of their updates, and their subspaces.

    Cosine is 1 for the same direction, -1 for the opposite, 0 for unrelated updates. Overlap is the mean squared cosine
    of the principal angles between the output (writes) or input (reads) subspaces: 1 if equal, near 0 if unrelated.
    """
    for folder in (first, second):
        check_adapters([folder])
    from lorakit import core

    found = core.compare_folders(first, second)
    if json:
        console.emit_json(as_dict(found))
    else:
        console.say(_text(found))


def as_dict(found: Comparison) -> dict[str, Any]:
    """Return the comparison as plain JSON values.

    Args:
        found: The comparison.
    """
    return {**asdict(found), "dora": "DoRA" in found.in_part, "groups": groups(found.sites)}


def groups(sites: Sequence[SiteComparison]) -> list[dict[str, Any]]:
    """Group sites by the last name of their path, in order, with statistics of each group.

    Args:
        sites: Compared sites.

    Returns:
        {"module", "sites", "cosine": {"min", "median", "max"}, "norms", "output_overlap", "input_overlap"};
        the last three are medians.
    """
    by_name: dict[str, list[SiteComparison]] = {}
    for site in sites:
        by_name.setdefault(site.path.rpartition(".")[2], []).append(site)
    return [_group(name, members) for name, members in by_name.items()]


def _group(name: str, members: list[SiteComparison]) -> dict[str, Any]:
    cosines = [site.cosine for site in members]
    return {
        "module": name,
        "sites": len(members),
        "cosine": {"min": min(cosines), "median": statistics.median(cosines), "max": max(cosines)},
        "norms": [statistics.median(site.norms[which] for site in members) for which in (0, 1)],
        "output_overlap": statistics.median(site.output_overlap for site in members),
        "input_overlap": statistics.median(site.input_overlap for site in members),
    }


def _text(found: Comparison) -> str:
    first, second = found.names
    lines = [
        f"{first} and {second}: cosine {found.cosine:.4f} over all sites",
        f"norms      {found.norms[0]:.3g} and {found.norms[1]:.3g}",
        f"base       {found.base}",
    ]
    for title in found.in_part:
        lines.append(f"{title:<10} only the low-rank parts are compared")
    for folder, paths in ((first, found.only_first), (second, found.only_second)):
        if paths:
            lines.append(f"only in    {folder}: {len(paths)} sites, first {paths[0]}")
    lines = [*map(console.inline, lines)]
    header = ["module", "sites", "cosine min", "median", "max", "‖ΔW‖", "‖ΔW‖ second", "writes", "reads"]
    rows = [_row(group) for group in groups(found.sites)]
    lines += ["", console.table(header, rows) if rows else "no site in common"]
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
