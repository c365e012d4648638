"""`lorakit extract`: an adapter from a fully fine-tuned model and its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import naming_flags
from lorakit.cli.early import check_model, check_new_directory
from lorakit.tables import format_percent

if TYPE_CHECKING:
    from torch import nn

    from lorakit.config import LoraConfig
    from lorakit.core import ExtractReport, TensorSource
    from lorakit.hub import ModelSource

WORST_SITES = 5
OUTSIDE_SHOWN = 8


@dataclass(frozen=True)
class Flags:
    """The flags of the verb, as their help says."""

    base: Annotated[str, Parameter(help="Model directory, hub id, or smollm2: what the fine-tuning began with.")]
    tuned: Annotated[str, Parameter(help="Model directory or hub id: the fine-tuned model.")]
    output_dir: Annotated[Path, Parameter(help="Adapter directory to make; it must not exist, or be empty.")]
    rank: Annotated[int | None, Parameter(help="Largest rank of a site.")] = None
    energy: Annotated[
        float | None, Parameter(help="Or the share of each site's change to hold, in (0, 1]; ranks then differ.")
    ] = None
    target_modules: Annotated[
        list[str] | None, Parameter(help="Module names, or all-linear, which is the default where nothing is named.")
    ] = None
    target_parameters: Annotated[
        list[str] | None,
        Parameter(help="Bare parameters such as mlp.experts.down_proj; without --target-modules, these alone."),
    ] = None
    modules_to_save: Annotated[
        list[str] | None, Parameter(help="Modules to take over whole, such as embeddings that grew.")
    ] = None
    allow_nonfinite: Annotated[bool, Parameter(negative=(), help="Keep a result that holds NaN or infinity.")] = False


def run(*, flags: Annotated[Flags, Parameter(name="*")], json: console.JsonFlag = False) -> None:
    """Take an adapter out of a fully fine-tuned model: at each site the nearest low-rank change.

    Directories with safetensors are read one weight at a time. What the adapter does not hold is said: the energy that
    the rank leaves out at each site, and every change outside the sites. Give --rank or --energy.
    """
    check_new_directory(flags.output_dir)
    check_model(flags.base)
    check_model(flags.tuned)
    from lorakit import core, hub
    from lorakit.core import Cut

    cut = Cut(flags.rank, flags.energy)
    sources = [hub.resolve(given, console.note) for given in (flags.base, flags.tuned)]
    for source in sources:
        hub.require(source)
    model, base, tuned = _read(*sources)
    config = _config(flags, model, sources[0].recorded_name)
    with naming_flags():
        report = core.extract_to_folder(
            model,
            base,
            tuned,
            config,
            flags.output_dir,
            cut=cut,
            allow=["nonfinite"] if flags.allow_nonfinite else [],
        )
    if json:
        console.emit_json({"output_dir": report.name, **report.as_dict()})
    else:
        console.say(_text(report))


def _config(flags: Flags, model: nn.Module, base_name: str | None) -> LoraConfig:
    from lorakit.config import LoraConfig

    words = flags.target_modules or ([] if flags.target_parameters else ["all-linear"])
    targets: Any = words[0] if words == ["all-linear"] else words
    return LoraConfig(
        target_modules=targets,
        target_parameters=flags.target_parameters,
        modules_to_save=flags.modules_to_save,
        task_type="CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
        base_model_name_or_path=base_name,
    )


def _read(base: ModelSource, tuned: ModelSource) -> tuple[nn.Module, TensorSource, TensorSource]:
    """The base's modules, and where both models' tensors are read: files where there are safetensors, else loaded."""
    from lorakit import core, hub

    if _has_files(base) and _has_files(tuned):
        skeleton = hub.skeleton(base)
        files = core.source_of_folder(base.path_or_id), core.source_of_folder(tuned.path_or_id)
        fused = [name for name, parameter in skeleton.named_parameters() if parameter.ndim > 2]
        if all(source.under([name]) is not None for source in files for name in fused):
            return skeleton, *files  # else the files hold experts one by one, and loading fuses them
    models = hub.load_model(base), hub.load_model(tuned)
    return models[0], core.source_of_model(models[0], base.given), core.source_of_model(models[1], tuned.given)


def _has_files(source: ModelSource) -> bool:
    return source.kind != "hub" and any(Path(source.path_or_id).glob("*.safetensors"))


def _text(report: ExtractReport) -> str:
    ranks = sorted(site.r for site in report.sites)
    lines = [
        f"{report.name}: {len(report.sites)} sites, ranks {ranks[0]} to {ranks[-1]}, scale 1",
        f"captured   {format_percent(report.captured)} of the energy of all that changed",
    ]
    if report.copied:
        lines.append(f"whole      {', '.join(report.copied)}")
    worst = sorted(report.sites, key=lambda site: -site.energy_lost)[:WORST_SITES]
    rows = [[s.path, str(s.r), f"{s.norm:.3g}", format_percent(s.energy_lost)] for s in worst]
    lines += ["", console.table(["site that is held least", "r", "‖ΔW‖", "left out"], rows)]
    if report.outside:
        lines += ["", f"not in the adapter: {len(report.outside)} other tensors"]
        for change in report.outside[:OUTSIDE_SHOWN]:
            by = "" if change.norm is None else f" by {change.norm:.3g}"
            lines.append(f"  - {change.name}: {change.why}{by}")
        if len(report.outside) > OUTSIDE_SHOWN:
            lines.append(f"  - and {len(report.outside) - OUTSIDE_SHOWN} more (--json lists all)")
    return "\n".join(lines)
