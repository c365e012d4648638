"""`lorakit train`: train an adapter.

The flags are generated from the table of settings; `lorakit.train` defines their effect. Paths on the command line are
checked before the other settings, because checking the other settings loads pydantic.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit import allocator
from lorakit.cli import console
from lorakit.cli.early import check_data, check_model, check_start
from lorakit.train.defaults import ALIASES, DEFAULTS
from lorakit.train.launching import LOST, PROCESS_ENDED, Launched, is_started_by_lorakit, launch

if TYPE_CHECKING:
    from lorakit.train.settings import TrainSettings


def _flags() -> type:
    """Return a dataclass with one flag per setting; a flag that is not given is None and overrides nothing."""
    short = {name: f"--{alias.replace('_', '-')}" for alias, name in ALIASES.items()}
    fields = [
        (
            name,
            Annotated[(row.flag or type(row.value)) | None, Parameter(help=row.help(), alias=short.get(name))],
            field(default=None),
        )
        for name, row in DEFAULTS.items()
    ]
    return make_dataclass("Flags", fields, frozen=True, namespace={"__module__": __name__})


Flags = _flags()
_NONE_GIVEN = Flags()


def run(
    *,
    config: Annotated[
        Path | None, Parameter(help="YAML file of settings with the same names as the flags; flags override it.")
    ] = None,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
    nproc: Annotated[
        int | None,
        Parameter(help="Start N processes on this machine, which train together (as torchrun does). Default 1."),
    ] = None,
    flags: Annotated[Flags, Parameter(name="*", show_default=False)] = _NONE_GIVEN,  # type: ignore[valid-type]
) -> int:
    """Train an adapter and save it in a run directory.

    Only --model, --data and --output-dir are required; --model may be omitted with --from-adapter. Press Ctrl-C once to
    finish the step and save a checkpoint for --resume.
    """
    given: dict[str, Any] = asdict(flags)
    if given["new_tokens"] is not None:  # accept "a,b" and "a b"; only a config file allows commas in tokens
        given["new_tokens"] = ",".join(given["new_tokens"])
    launched = Launched.of(os.environ)
    if launched.count > 1:
        return _run_together(given, config, json=json, verbose=verbose)
    settings = _settings(given, config)
    if nproc is not None and nproc != 1:
        return _launch(nproc, settings, given, config, json=json, verbose=verbose)
    return _train(settings, json=json, verbose=verbose)


def _settings(given: Mapping[str, Any], config: Path | None) -> TrainSettings:
    """Return the settings after checking paths, before other settings if there is no file."""
    if config is None:
        _check(given)
    from lorakit.train.settings_sources import gather  # imports pydantic

    settings = gather(given, config)
    _check(settings.as_dict())
    return settings


def _run_together(given: Mapping[str, Any], config: Path | None, *, json: bool, verbose: bool) -> int:
    """Train in one of several processes; the first one prints, and reports errors of all of them.

    Returns:
        The exit code. The other processes return 0 if the first one reports what happened, so that a launcher does not
        stop it before it has done so.
    """
    from lorakit.errors import LorakitError
    from lorakit.train.processes import joined

    with joined() as processes:
        try:
            with processes.together():
                settings = _settings(given, config)
            code = _train(settings, json=json, verbose=verbose, is_silent=not processes.is_first)
        except (LorakitError, KeyboardInterrupt) as cause:
            is_ended = isinstance(cause, KeyboardInterrupt) or cause.field == PROCESS_ENDED
            if is_ended and is_started_by_lorakit():
                return LOST  # the launcher reports the signal, or which process ended
            if processes.is_first:
                raise
            return 0
    return code if processes.is_first else 0


def _launch(
    nproc: int, settings: TrainSettings, given: Mapping[str, Any], config: Path | None, *, json: bool, verbose: bool
) -> int:
    """Start the same command in several processes, and return the exit code."""
    from lorakit.errors import UsageError

    if nproc < 1:
        raise UsageError(f"nproc is {nproc}; it must be at least 1.", what=nproc, field="nproc")
    arguments = ["train", *(["--json"] if json else []), *(["--verbose"] if verbose else [])]
    arguments += [] if config is None else [f"--config={config}"]
    folder = settings.output_dir
    return launch(
        [*arguments, *_arguments(given)],
        nproc,
        f"If {folder} has a checkpoint, continue from it with: lorakit train --nproc {nproc} --output-dir {folder} "
        "--resume",
    )


def _arguments(given: Mapping[str, Any]) -> list[str]:
    """Return the flags that were given as arguments of a command."""
    found = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}={one}" for one in (value if isinstance(value, (list, tuple)) else [value])]
    return found


def _train(settings: TrainSettings, *, json: bool, verbose: bool, is_silent: bool = False) -> int:
    """Train, print the result unless `is_silent` is set, and return the exit code."""
    notes = allocator.set_up()  # before torch allocates any memory

    from lorakit.train import run as train  # imports torch and transformers
    from lorakit.train.progress import Progress, progress_for

    progress = Progress() if is_silent else progress_for(sys.stderr if json else sys.stdout, verbose=verbose)
    for sentence in notes:
        progress.detail(sentence)
    result = train(settings, progress)
    if json and not is_silent:
        console.emit_json(result.as_dict())
    elif not is_silent:
        for line in result.lines(verbose):
            console.say(line)
    return 130 if result.ending == "interrupted" else 0


def _check(settings: Mapping[str, Any]) -> None:
    """Check the given run directory, data, model and adapter paths without importing pydantic or torch."""
    folder = Path(settings["output_dir"] or "")
    if settings["output_dir"] is not None and folder.is_dir() and not settings["resume"] and not settings["overwrite"]:
        from lorakit.report import RUN_FILE
        from lorakit.train.run_folder import raise_run_exists

        if (folder / RUN_FILE).exists():
            raise_run_exists(folder)
    check_data([*(settings["data"] or ()), *(settings["eval_data"] or ())])
    if settings["model"] is not None:
        check_model(settings["model"], settings["revision"])
    if settings["from_adapter"] is not None and not settings["resume"]:
        check_start(settings["from_adapter"])
