"""`lorakit export`: write an adapter for another runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, get_args

from cyclopts import Parameter

from lorakit.choices import ExportFormatName, GgufType
from lorakit.cli import console
from lorakit.cli.adapters import NAME, naming_flags
from lorakit.cli.early import adapter_folders, check_at_least, check_model, check_new_directory
from lorakit.durable import JsonObject
from lorakit.errors import AdapterError, UsageError
from lorakit.hub_cache import split_revision
from lorakit.terminal import working


@dataclass(frozen=True)
class Flags:
    """Flags of `lorakit export`."""

    output_dir: Annotated[
        Path, Parameter(help="Directory for the export; new or empty, except for peft, vllm and sglang.")
    ]
    name: Annotated[
        str | None, Parameter(help="Name of the adapter in requests. Default: that of its directory or run.")
    ] = None
    model: Annotated[
        str | None,
        Parameter(help="Base, whose config gguf and mlx need. Default: the one that the adapter names."),
    ] = None
    served_base: Annotated[
        str | None, Parameter(help="Base exactly as the runtime gets it (vLLM's --model). Default: the recorded name.")
    ] = None
    merged: Annotated[
        bool, Parameter(negative=(), help="For gguf: merge the adapter into --base-gguf, for llama.cpp and Ollama.")
    ] = False
    base_gguf: Annotated[
        Path | None,
        Parameter(help="Base as a GGUF file, for gguf with --merged or --verify. Default: the base, if it is one."),
    ] = None
    outtype: Annotated[GgufType | None, Parameter(help="How --merged stores the weights. Default: F16.")] = None
    verify: Annotated[
        bool,
        Parameter(
            negative=(),
            help="First compare the answers of the adapter in this form with lorakit's; write nothing if they differ.",
        ),
    ] = False
    prompts: Annotated[int, Parameter(help="Number of prompts for --verify.")] = 20
    untested_architecture: Annotated[
        bool, Parameter(negative=(), help="Accept an architecture that was not tested in the runtime.")
    ] = False
    allow_base_mismatch: Annotated[
        bool, Parameter(negative=(), help="Accept a --base-gguf whose values are not those of the adapter's base.")
    ] = False


def run(
    format: Annotated[ExportFormatName, Parameter(help=f"Runtime or format: {', '.join(get_args(ExportFormatName))}.")],
    adapter: Annotated[str, Parameter(help=f"{NAME}, of lorakit or PEFT.")],
    *,
    flags: Annotated[Flags, Parameter(name="*")],
    json: console.JsonFlag = False,
) -> None:
    """Write an adapter for another runtime, in a form from which that runtime computes the same answers.

    The adapter is first converted to plain LoRA in fp32 with one rank and scale 1, from its files alone; what cannot be
    converted exactly is rejected. Each export is named NAME@HASH12 after its content, and is never changed: caches of
    other runtimes are keyed by name.

    Raises:
        AdapterError: The adapter has a part that the runtime cannot apply, or --verify finds other answers.
        UsageError: The output directory has other files.
    """
    check_at_least("prompts", flags.prompts, 1)
    if flags.model is not None:
        check_model(flags.model)
    ((given, folder),) = adapter_folders([adapter]).items()
    from lorakit.core import common_form
    from lorakit.export.formats import FORMATS, export
    from lorakit.export.request import ExportRequest
    from lorakit.registry import check_name, name_of
    from lorakit.session.spec import recorded_base, resolve_base

    name = f"{format} --merged" if flags.merged else format
    if name not in FORMATS:
        raise UsageError(f"--merged: {format} has no merged form; use gguf, or lorakit merge.", field="merged")
    if flags.outtype and not flags.merged:
        raise UsageError("--outtype says how --merged stores the weights; add --merged, or omit it.", field="outtype")
    entry = FORMATS[name]
    if not entry.is_library:
        check_new_directory(flags.output_dir)
    common = common_form(folder)
    base = None
    if entry.needs_base:
        named = flags.model or recorded_base(common.folder, common.weights.config, common.weights.facts)
        base = resolve_base(named, flags.model, given, console.note)
    request = ExportRequest(
        adapter=common,
        name=check_name(flags.name or name_of(Path(folder if Path(given).exists() else split_revision(given)[0]))),
        base=base,
        served_base=flags.served_base,
        allow_untested=flags.untested_architecture,
        allow_mismatch=flags.allow_base_mismatch,
        base_gguf=flags.base_gguf,
        outtype=flags.outtype or "F16",
        verified=_verified(given, folder, entry.verified_as, flags) if flags.verify else {},
        card=_card,
    )
    with naming_flags(Flags):
        exported, target = export(name, request, flags.output_dir)
    commands = entry.commands(exported.name, exported.base, common.rank, str(flags.output_dir))
    if json:
        said = {"name": exported.name, "path": str(target), "commands": dict(commands)}
        console.emit_json({**said, "notes": list(exported.notes), "rank": common.rank})
        return
    for text in exported.notes:
        console.note(text)
    console.say(f"{given}: exported as {entry.title}, rank {common.rank}, to {target}")
    for runtime, command in commands.items():
        console.say(f"\n{runtime}:\n{command}")


def _card(folder: Path, export: Path, name: str) -> str:
    """Return the README of an export, from the adapter's files and, if a run trained it, the record of the run."""
    from lorakit.core import inspect_adapter
    from lorakit.train.files.model_card import card_of

    return card_of(folder, inspect_adapter(folder).parameters, (export, name))


def _verified(given: str, folder: str, runtime: str, flags: Flags) -> JsonObject:
    """Return the report on the adapter's answers in a runtime; an AdapterError if they differ from lorakit's."""
    from lorakit.verify import VerifyOptions, verify

    with working("verifying"):
        session = replace(VerifyOptions.session, allow=["base_mismatch"] * flags.allow_base_mismatch)
        options = VerifyOptions(
            flags.model,
            prompts=flags.prompts,
            session=session,
            base_gguf=flags.base_gguf,
            outtype=flags.outtype or "F16",
        )
        report = verify(folder, [runtime], options, console.quiet)
    (compared,) = report.comparisons
    if not report.is_good:
        text = f"{given}: {compared.title} gives other answers: {' '.join(compared.problems)} Nothing was written."
        raise AdapterError(text, what=runtime, where=folder)
    console.note(f"{compared.title}: log-probabilities differ by at most {compared.difference:.1e}")
    return report.as_record()
