"""`lorakit verify`: compare an adapter's answers in other runtimes with lorakit's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit import allocator
from lorakit.choices import DTYPES, VERIFY_NAMES, GgufType
from lorakit.cli import console
from lorakit.cli.adapters import NAME
from lorakit.cli.early import adapter_folders, check_at_least, check_choice, check_data, check_device, check_model
from lorakit.cli.flag_groups import RevisionFlag
from lorakit.errors import DiskError, UsageError
from lorakit.hub_cache import adapter_directory, is_on_hub
from lorakit.terminal import working

if TYPE_CHECKING:
    from lorakit.verify import Comparison, VerifyReport

MOST_SECONDS = 86_400
"""Largest --timeout."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `lorakit verify`."""

    against: Annotated[
        list[str],
        Parameter(
            help=f"Runtimes, separated by commas: {', '.join(VERIFY_NAMES)}, and URLs of servers (vLLM, llama-server)."
        ),
    ]
    model: Annotated[
        str | None,
        Parameter(help="Model directory, GGUF file, Hub id, or smollm2. Default: the base that the adapter names."),
    ] = None
    revision: RevisionFlag = None
    data: Annotated[
        list[str] | None, Parameter(help="Files with held-out prompts, as for eval. Default: packaged prompts.")
    ] = None
    prompts: Annotated[int, Parameter(help="Number of prompts.")] = 20
    max_new_tokens: Annotated[int, Parameter(help="Number of greedy tokens for each prompt.")] = 16
    base_gguf: Annotated[
        Path | None,
        Parameter(help="Base as a GGUF file, for gguf and gguf-merged; F32 for a comparison within the bounds."),
    ] = None
    outtype: Annotated[GgufType, Parameter(help="How gguf-merged stores the merged weights.")] = "F32"
    served_model: Annotated[
        str | None, Parameter(help="Name of the adapter on the server. Default: the one named like its directory.")
    ] = None
    api_key_env: Annotated[str | None, Parameter(help="Environment variable that has the server's API key.")] = None
    timeout: Annotated[float, Parameter(help="Longest time for one answer of a server in seconds.")] = 60.0
    dtype: Annotated[
        str,
        Parameter(
            help="Precision of lorakit, and of the runtime: float32, bfloat16, float16 or auto. Differences are judged "
            "in float32, and reported in others."
        ),
    ] = "float32"
    device: Annotated[str, Parameter(help="cpu, cuda, cuda:N, mps or auto; of lorakit.")] = "cpu"


def run(
    adapter: Annotated[str, Parameter(help=f"{NAME}, of lorakit or PEFT.")],
    *,
    flags: Annotated[Flags, Parameter(name="*")],
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> int:
    """Compare an adapter's answers in other runtimes with lorakit's, on prompts that it was not trained on.

    Compared are the token ids of the prompts, the log-probabilities of their tokens and of lorakit's answers, and the
    greedy tokens. In float32, differences above a bound fail: 1e-4 after saving or merging, 1e-3 in llama.cpp, mlx-lm
    and servers. In any dtype, the runtime must be closer to lorakit's adapter than its base and its other models are.
    The exit code is 1 if a runtime gives other answers. The results are written to `lorakit.json` and the README of a
    local adapter, in place of older ones for the same runtimes and dtypes. --verbose adds each step.

    Raises:
        ConfigError: A runtime is unknown.
        LorakitError: A runtime cannot be opened or asked.
    """
    targets = [name for word in flags.against for part in word.split(",") if (name := part.strip())]
    _check(flags, targets)
    ((given, folder),) = adapter_folders([adapter]).items()
    allocator.set_up()  # before torch allocates any memory
    from lorakit.session import SessionOptions
    from lorakit.verify import VerifyOptions, verify

    revision = flags.revision if flags.model is None else None
    options = VerifyOptions(
        model=None if flags.model is None else check_model(flags.model, flags.revision),
        data=flags.data or (),
        prompts=flags.prompts,
        new_tokens=flags.max_new_tokens,
        session=SessionOptions(flags.dtype, flags.device, revision=revision),
        base_gguf=flags.base_gguf,
        outtype=flags.outtype,
        served_model=flags.served_model,
        key=None if flags.api_key_env is None else os.environ[flags.api_key_env],
        timeout=flags.timeout,
    )
    with working("verifying"):
        report = verify(folder, targets, options, console.note if verbose else console.quiet)
    if json:
        console.emit_json({**report.as_dict(), "adapter": given})
    else:
        console.say(_text(given, report))
    if not is_on_hub(given):
        _record(Path(folder), report)
    return 0 if report.is_good else 1


def _record(folder: Path, report: VerifyReport) -> None:
    """Write a report to the adapter's files; if they cannot be changed, say so."""
    from lorakit.train.files.model_card import record_verification

    try:
        reason = record_verification(adapter_directory(folder), report.as_record())
    except DiskError as cause:
        console.warning(f"the results are not recorded: {cause}")
    else:
        if reason:
            console.note(f"{folder}: the results are not recorded, because {reason}.")


def _check(flags: Flags, targets: Sequence[str]) -> None:
    """Check everything that needs neither torch nor a model."""
    for target in targets:
        if "://" not in target:
            check_choice("against", target, (*VERIFY_NAMES, "http://HOST:PORT"))
    if not targets:
        raise UsageError("--against names no runtime.", field="against", allowed=VERIFY_NAMES)
    check_choice("dtype", flags.dtype, DTYPES)
    check_device(flags.device)
    check_at_least("prompts", flags.prompts, 1)
    check_at_least("max_new_tokens", flags.max_new_tokens, 1)
    check_data(flags.data or ())
    if not 0 < flags.timeout <= MOST_SECONDS:
        text = f"--timeout must be above 0 and at most {MOST_SECONDS:,} seconds."
        raise UsageError(text, what=flags.timeout, field="timeout")
    if flags.api_key_env is not None and not os.environ.get(flags.api_key_env):
        text = f"the environment variable {flags.api_key_env} of --api-key-env is not set."
        raise UsageError(text, what=flags.api_key_env, field="api_key_env")


def _text(given: str, report: VerifyReport) -> str:
    """Return the report as lines: what was compared, a table of runtimes, and what is wrong."""
    rows = [_row(one) for one in report.comparisons]
    header = ["runtime", "dtype", "log-probabilities", "bound", "greedy", "token ids", "result"]
    first = report.comparisons[0]
    lines = [
        f"{console.inline(given)}: {first.prompts} prompts ({report.prompts}), {first.tokens} tokens; the adapter "
        f"changes log-probabilities by up to {report.effect:.2g}",
        "",
        console.table(header, rows),
        "",
    ]
    for one in report.comparisons:
        versions = ", ".join(f"{name} {number}" for name, number in one.versions.items())
        lines += [f"{one.runtime}: {console.inline(one.title)} ({console.inline(versions)})"]
        lines += [f"  {console.inline(problem)}" for problem in one.problems]
    return "\n".join(lines)


def _row(one: Comparison) -> list[str]:
    same = "unknown" if one.greedy_same is None else f"{one.greedy_same} of {one.prompts}"
    ids = "unknown" if one.other_tokens is None else f"{len(one.other_tokens)} differ" if one.other_tokens else "equal"
    bound = f"{one.bound:.0e}" if one.is_judged else "-"
    result = "differs" if one.problems else "ok" if one.is_judged else "not judged"
    return [one.runtime, one.dtype, f"{one.difference:.1e}", bound, same, ids, result]
