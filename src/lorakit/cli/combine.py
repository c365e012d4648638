"""`lorakit combine`: combine several adapters into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import (
    NAMES,
    WORST_SITES,
    copy_tokenizer,
    naming_flags,
    overridden,
    print_report,
    read_adapters,
)
from lorakit.cli.early import adapter_folders, check_model, check_new_directory
from lorakit.cli.flag_groups import RevisionFlag
from lorakit.durable_folders import publish_directory
from lorakit.errors import UsageError
from lorakit.tables import format_count, format_percent

if TYPE_CHECKING:
    from lorakit.core import OperationReport


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit combine`."""

    adapter: Annotated[list[str], Parameter(help=f"{NAMES}, of lorakit or PEFT, all for the same base.")]
    output_dir: Annotated[Path, Parameter(help="Adapter directory to create; must be new or empty.")]
    weights: Annotated[
        list[float] | None, Parameter(help="One weight per adapter; negative weights subtract. Default: all 1.")
    ] = None
    way: Annotated[
        str,
        Parameter(
            help="Method: cat (exact; ranks add up), svd (best approximation at a given rank), linear (approximate); "
            "ties, dare_ties, dare_linear and magnitude_prune prune A and B separately; with the suffix _svd, they "
            "prune the full update."
        ),
    ] = "svd"
    rank: Annotated[
        int | None, Parameter(help="Rank of the result for svd methods. Default: the largest rank at each site.")
    ] = None
    density: Annotated[float | None, Parameter(help="Fraction of values that pruning keeps, in (0, 1].")] = None
    majority_sign: Annotated[
        str, Parameter(help="Sign that ties methods keep: total (sign of the sum) or frequency (most common sign).")
    ] = "total"
    clamp: Annotated[
        float | None, Parameter(help="Quantile in (0.5, 1] beyond which svd methods clamp A and B. Default: none.")
    ] = None
    seed: Annotated[int | None, Parameter(help="Seed for the random pruning of dare methods.")] = None
    model: Annotated[
        str | None, Parameter(help="Base model; required only for DoRA, which depends on the base's weights.")
    ] = None
    revision: RevisionFlag = None
    allow_base_mismatch: Annotated[
        bool, Parameter(negative=(), help="Combine adapters for different base models or tasks.")
    ] = False
    allow_key_mismatch: Annotated[bool, Parameter(negative=(), help="Combine adapters with no common sites.")] = False
    allow_nonfinite: Annotated[bool, Parameter(negative=(), help="Keep a result that has NaN or infinite values.")] = (
        False
    )


def run(*, flags: Annotated[Flags, Parameter(name="*")], json: console.JsonFlag = False) -> None:
    """Combine adapters into one; the base is not loaded, except for DoRA.

    The updates scale · B·A are combined, so ranks, alphas and rsLoRA may differ. The result has scale 1. Its deviation
    from the plain weighted sum is printed, as are the sites that deviate most.
    """
    check_new_directory(flags.output_dir)
    base = None if flags.model is None else check_model(flags.model, flags.revision)
    adapters = adapter_folders(flags.adapter)
    flags = replace(flags, adapter=[*adapters])
    from lorakit import core, hub

    way = core.CombinationType(flags.way, flags.rank, flags.density, flags.majority_sign, flags.clamp, seed=flags.seed)
    weights = _weights(flags)
    folders = [*adapters.values()]
    files = read_adapters(folders)
    model = None
    if base is not None:
        source = hub.resolve(base, console.note)
        hub.require(source)
        model = hub.load_model(source, "float32")
    with naming_flags(), publish_directory(flags.output_dir) as folder:
        report = core.combine_folders(folders, weights, folder, way=way, model=model, allow=overridden(asdict(flags)))
        copy_tokenizer(files, folder)
    print_report(report, _text(report, flags, weights), flags.output_dir, json)


def _weights(flags: Flags) -> list[float]:
    adapters = len(flags.adapter)
    weights = flags.weights or [1.0] * adapters
    if len(weights) != adapters:
        text = f"--weights ({len(weights)}) and --adapter ({adapters}) differ in length; pass one weight per adapter."
        raise UsageError(text, what=weights, field="weights")
    return weights


def _text(report: OperationReport, flags: Flags, weights: Sequence[float]) -> list[str]:
    ranks = sorted({site.r for site in report.sites})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    total = " + ".join(f"{weight:g} × {folder}" for weight, folder in zip(weights, flags.adapter, strict=True))
    lines = [
        f"{flags.output_dir}: {format_count(len(report.sites), 'site')}, {rank}, scale 1",
        f"combined   {total} by {flags.way}",
        f"deviation  at most {format_percent(report.deviation)} from the plain sum",
    ]
    if report.deviation > 0 and len(report.sites) > 1:
        worst = sorted(report.sites, key=lambda site: -site.deviation)[:WORST_SITES]
        rows = [[site.path, str(site.r), format_percent(site.deviation)] for site in worst]
        lines += ["", console.table(["sites that deviate most", "r", "deviation"], rows)]
    return lines
