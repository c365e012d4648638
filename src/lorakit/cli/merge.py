"""`lorakit merge`: merge adapters into the base model, and write a model directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.choices import DTYPES
from lorakit.cli import adapters, console
from lorakit.cli.early import adapter_folders, check_base, check_choice, check_new_directory
from lorakit.cli.flag_groups import RevisionFlag
from lorakit.errors import MergeError
from lorakit.plan.quantized import Quantization, stored_as
from lorakit.tables import format_bytes, format_count, format_percent
from lorakit.terminal import working
from lorakit.train.settings.defaults import DEFAULTS

if TYPE_CHECKING:
    from lorakit.session.merging import Merged, MergeRequest, Probe

LITTLE_RETAINED = 0.5
LARGE_DIFFERENCE = 0.5  # as a fraction of the adapters' effect on the base


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `lorakit merge`."""

    model: adapters.ModelFlag = None
    adapter: Annotated[list[str], Parameter(help=f"{adapters.NAMES}; the updates of several adapters are summed.")]
    output_dir: Annotated[Path, Parameter(help="Model directory to create; must be new or empty.")]
    revision: RevisionFlag = None
    dtype: Annotated[
        str,
        Parameter(
            help="Precision of the written weights: auto (the base's), bfloat16, float16 or float32. The merge is "
            "computed in float32; writing float32 keeps small updates exactly, at twice the size."
        ),
    ] = "auto"
    quantization: Annotated[
        str | None,
        Parameter(
            help="Merge into the base as it was quantized for training (nf4, ...); the output contains the dequantized "
            "weights with the adapter merged in. Default: the base as published."
        ),
    ] = None
    double_quantization: Annotated[bool, Parameter(help=DEFAULTS["double_quantization"].help())] = True
    untie: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Untie an adapted weight that another module shares (tied embeddings), and record this in the config.",
        ),
    ] = False


def run(
    *,
    flags: Annotated[Flags, Parameter(name="*")],
    allow: Annotated[adapters.Allowances, Parameter(name="*")] = adapters.NONE_ALLOWED,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> None:
    """Merge adapters into the base model, and write a model directory that any program can load.

    The result is reloaded and compared with the unmerged base and adapters, and is kept only if the outputs agree.
    The output directory records the merged adapters, so that lorakit does not apply them twice. --verbose also
    prints each step, and the sites with the largest rounding loss.
    """
    check_choice("dtype", flags.dtype, DTYPES)
    check_new_directory(flags.output_dir)
    model = check_base(flags.model, flags.revision, flags.adapter)
    quantization = stored_as(flags.quantization, flags.double_quantization)
    folders = adapter_folders(flags.adapter)
    from lorakit import hub
    from lorakit.session import SessionOptions, session_spec
    from lorakit.session.merging import MergeRequest, record, write_merged

    files = adapters.read_adapters([*folders.values()])
    allowed, revision = adapters.overridden(asdict(allow)), flags.revision if model is None else None
    options = SessionOptions(quantization=quantization, allow=allowed, revision=revision)
    spec = session_spec(model, dict(zip(folders, files, strict=True)), options, say=console.note)
    hub.require(spec.source)
    _reject_quantized_files(spec.source.given, hub.stored_as_files(spec.source, quantization), quantization)
    console.remarks(spec.remarks)
    request = MergeRequest(spec, flags.output_dir, flags.dtype, flags.untie)
    with working("merging"), adapters.naming_flags():
        done, probe = write_merged(request, console.note if verbose else console.quiet)
    for text in merge_warnings(done, probe):
        console.warning(text)
    if json:
        sizes = {"weights_bytes": done.weights_bytes, "parameters": done.parameters}
        console.emit_json({"output_dir": str(done.folder), **sizes, **record(request, done, probe)})
    else:
        console.say(_text(request, done, probe, verbose))


def merge_warnings(done: Merged, probe: Probe) -> list[str]:
    """Return warnings about a completed merge and its comparison with the unmerged base and adapters."""
    warnings = []
    if done.report.retained < LITTLE_RETAINED:
        warnings.append(
            f"only {format_percent(done.report.retained, 0)} of the adapter's update is retained in {done.dtype} "
            "weights; the rest is too small for that precision. Pass --dtype float32 to keep it."
        )
    if probe.max_difference > LARGE_DIFFERENCE * probe.effect:
        warnings.append(
            f"the merged model's logits differ from those of the unmerged model by up to {probe.max_difference:.2g}, "
            f"while the adapters change the base's logits by up to {probe.effect:.2g}, so most of their effect is "
            "lost. --dtype float32 may preserve it."
        )
    if not done.has_tokenizer:
        warnings.append("neither the model nor the adapters have a tokenizer, so none was written.")
    return warnings


def _reject_quantized_files(model: str, stored: Quantization | None, wanted: Quantization | None) -> None:
    if stored is not None and wanted is None:
        raise MergeError(
            f"{model}: the files are quantized ({stored.name}), but a merge needs the unquantized base. Pass that base "
            f"as --model, and --quantization {stored.name} to merge into the weights that the adapter was trained on.",
            where=model,
        )


def _text(request: MergeRequest, done: Merged, probe: Probe, verbose: bool) -> str:
    retained = format_percent(done.report.retained)
    same = f"same top token as the unmerged model at {format_percent(probe.same_top, 0)} of positions; logits differ"
    what = same if request.spec.task.task.generates else "outputs differ from the unmerged model's"
    lines = [
        f"{done.folder}: {done.parameters:,} parameters, {format_bytes(done.weights_bytes)} in {done.dtype}",
        f"merged     {' + '.join(request.spec.adapters)} at {format_count(len(done.report.sites), 'site')}",
        f"checked    {what} by up to {probe.max_difference:.2g} (allowed {probe.tolerance:.2g}), adapters change them "
        f"by up to {probe.effect:.2g}",
        f"retained   {retained} of the update on average, after rounding to {done.dtype}",
    ]
    if done.untied:
        lines.append("untied     input and output embeddings are separate weights (tie_word_embeddings is false)")
    worst = sorted(done.report.sites, key=lambda site: site.retained)[: adapters.WORST_SITES] if verbose else []
    if worst:
        rows = [[site.path, format_percent(site.retained), format_percent(site.changed)] for site in worst]
        lines += ["", console.table(["sites that retain least", "retained", "weights changed"], rows)]
    return "\n".join(lines)
