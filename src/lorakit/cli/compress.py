"""`lorakit compress`: reduce the rank of an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import (
    NAME,
    WORST_SITES,
    copy_tokenizer,
    naming_flags,
    overridden,
    print_report,
    read_adapters,
)
from lorakit.cli.early import adapter_folders, check_new_directory
from lorakit.durable_folders import publish_directory
from lorakit.tables import format_count, format_percent

if TYPE_CHECKING:
    from lorakit.core import OperationReport


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit compress`."""

    adapter: Annotated[str, Parameter(help=f"{NAME}, of lorakit or PEFT.")]
    output_dir: Annotated[Path, Parameter(help="Adapter directory to create; must be new or empty.")]
    rank: Annotated[int | None, Parameter(help="Maximum rank at each site.")] = None
    energy: Annotated[
        float | None,
        Parameter(
            help="Fraction of each site's energy ‖ΔW‖² to keep, in (0, 1]; 1 drops only directions with no energy."
        ),
    ] = None
    allow_nonfinite: Annotated[bool, Parameter(negative=(), help="Keep a result that has NaN or infinite values.")] = (
        False
    )


def run(*, flags: Annotated[Flags, Parameter(name="*")], json: console.JsonFlag = False) -> None:
    """Compress an adapter by replacing each site's update with its best lower-rank approximation.

    Only the adapter's weights are needed; the base is not loaded. The output gives the exact fraction of the updates'
    energy that is lost. Pass --rank or --energy.
    """
    check_new_directory(flags.output_dir)
    ((name, adapter),) = adapter_folders([flags.adapter]).items()
    flags = replace(flags, adapter=name)
    from lorakit import core

    files = read_adapters([adapter])
    allow = overridden(asdict(flags))
    with naming_flags(), publish_directory(flags.output_dir) as folder:
        report = core.compress_folder(adapter, folder, rank=flags.rank, energy=flags.energy, allow=allow)
        copy_tokenizer(files, folder)
    print_report(report, _text(report, flags), flags.output_dir, json)


def _text(report: OperationReport, flags: Flags) -> list[str]:
    before, after = (sum(getattr(site, name) for site in report.sites) for name in ("r_before", "r"))
    lines = [
        f"{flags.output_dir}: {flags.adapter} at {format_count(len(report.sites), 'site')}, total rank "
        f"{before:,} before, {after:,} after",
        f"lost       {format_percent(report.energy_lost)} of the energy ‖ΔW‖² of the whole adapter",
    ]
    worst = sorted(report.sites, key=lambda site: -site.energy_lost)[:WORST_SITES]
    rows = [[s.path, str(s.r_before), str(s.r), format_percent(s.energy_lost)] for s in worst if s.energy_lost > 0]
    if rows:
        lines += ["", console.table(["sites that lose most", "r before", "r", "lost"], rows)]
    return lines
