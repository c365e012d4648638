"""`lorakit extract`: extract an adapter from a fully fine-tuned model and its base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import WORST_SITES, naming_flags, overridden, print_report
from lorakit.cli.early import check_model, check_new_directory
from lorakit.config import LoraConfig
from lorakit.tables import format_count, format_percent

if TYPE_CHECKING:
    from torch import nn

    from lorakit.core import ExtractReport, TensorSource
    from lorakit.hub import ModelSource

OUTSIDE_SHOWN = 8


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit extract`."""

    base: Annotated[str, Parameter(help="Base: model directory, Hub id (owner/name[@revision]), or smollm2.")]
    tuned: Annotated[str, Parameter(help="Fine-tuned model: model directory or Hub id (owner/name[@revision]).")]
    output_dir: Annotated[Path, Parameter(help="Adapter directory to create; must be new or empty.")]
    rank: Annotated[int | None, Parameter(help="Maximum rank at each site.")] = None
    energy: Annotated[
        float | None, Parameter(help="Fraction of each site's energy to capture, in (0, 1]; ranks may then differ.")
    ] = None
    target_modules: Annotated[
        list[str] | None, Parameter(help="Module names, or all-linear (the default without --target-parameters).")
    ] = None
    target_parameters: Annotated[
        list[str] | None,
        Parameter(
            help="Names of parameters, such as mlp.experts.down_proj; without --target-modules, only these are used."
        ),
    ] = None
    modules_to_save: Annotated[
        list[str] | None, Parameter(help="Modules to save in full, such as resized embeddings.")
    ] = None
    allow_nonfinite: Annotated[bool, Parameter(negative=(), help="Keep a result that has NaN or infinite values.")] = (
        False
    )


def run(*, flags: Annotated[Flags, Parameter(name="*")], json: console.JsonFlag = False) -> None:
    """Extract an adapter from a fully fine-tuned model: the best low-rank approximation of each site's change.

    Directories with safetensors files are read one weight at a time. The output lists what the adapter does not
    capture: the fraction of the energy left out at the sites, and changes to other tensors. Pass --rank or --energy.
    """
    check_new_directory(flags.output_dir)
    check_model(flags.base)
    check_model(flags.tuned)
    from lorakit import core, hub

    cut = core.RankLimit(flags.rank, flags.energy)
    sources = [hub.resolve(given, console.note) for given in (flags.base, flags.tuned)]
    for source in sources:
        hub.require(source)
    families = [hub.config_of(source).model_type for source in sources]
    if families[0] != families[1]:
        console.warning(
            f"{flags.tuned} is a model of the family {families[1]}, and {flags.base} of {families[0]}; check --base."
        )
    model, base, tuned = _read(*sources)
    config = _config(flags, model, sources[0])
    with naming_flags():
        report = core.extract_to_folder(
            model, base, tuned, config, flags.output_dir, cut=cut, allow=overridden(asdict(flags))
        )
    print_report(report, _text(report), flags.output_dir, json)


def _config(flags: Flags, model: nn.Module, base: ModelSource) -> LoraConfig:
    words = flags.target_modules or ([] if flags.target_parameters else ["all-linear"])
    targets = words[0] if words == ["all-linear"] else words
    return LoraConfig(
        target_modules=targets,
        target_parameters=flags.target_parameters,
        modules_to_save=flags.modules_to_save,
        task_type="CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
        base_model_name_or_path=base.recorded_name,
        revision=base.revision,
    )


def _read(base: ModelSource, tuned: ModelSource) -> tuple[nn.Module, TensorSource, TensorSource]:
    """Return the base's modules and both models' tensors, read from safetensors files if possible."""
    from lorakit import core, hub

    if _has_files(base) and _has_files(tuned):
        skeleton = hub.skeleton(base)
        files = core.source_of_folder(base.path_or_id), core.source_of_folder(tuned.path_or_id)
        fused = [name for name, parameter in skeleton.named_parameters() if parameter.ndim > 2]
        if all(source.under([name]) is not None for source in files for name in fused):
            return skeleton, *files  # if the files store experts separately, load the models to fuse them
    models = hub.load_model(base), hub.load_model(tuned)
    return models[0], core.source_of_model(models[0], base.given), core.source_of_model(models[1], tuned.given)


def _has_files(source: ModelSource) -> bool:
    return source.kind in ("directory", "packaged") and any(Path(source.path_or_id).glob("*.safetensors"))


def _text(report: ExtractReport) -> list[str]:
    ranks = sorted(site.r for site in report.sites)
    lines = [
        f"{report.name}: {format_count(len(report.sites), 'site')}, ranks {ranks[0]} to {ranks[-1]}, scale 1",
        f"captured   {format_percent(report.captured)} of the energy of all changes",
    ]
    if report.copied:
        lines.append(f"in full    {', '.join(report.copied)}")
    worst = sorted(report.sites, key=lambda site: -site.energy_lost)[:WORST_SITES]
    rows = [[s.path, str(s.r), f"{s.norm:.3g}", format_percent(s.energy_lost)] for s in worst]
    lines += ["", console.table(["sites captured least", "r", "‖ΔW‖", "left out"], rows)]
    if report.outside:
        lines += ["", f"not in the adapter: {len(report.outside)} other tensors"]
        for change in report.outside[:OUTSIDE_SHOWN]:
            by = "" if change.norm is None else f" by {change.norm:.3g}"
            lines.append(f"  - {change.name}: {change.why}{by}")
        if len(report.outside) > OUTSIDE_SHOWN:
            lines.append(f"  - and {len(report.outside) - OUTSIDE_SHOWN} more (--json lists all)")
    return lines
