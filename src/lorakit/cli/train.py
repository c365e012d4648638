"""`lorakit train`: train an adapter.

The flags are generated from the table of settings; `lorakit.train` defines their effect. Paths on the command line are
checked before the other settings, because checking the other settings loads pydantic.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from lorakit import allocator
from lorakit.cli import console
from lorakit.cli.early import check_data, check_model
from lorakit.hub_cache import find_adapter
from lorakit.startup import rare_collections
from lorakit.train.processes import launching
from lorakit.train.settings.defaults import DEFAULTS, flag_type, types_of_settings

if TYPE_CHECKING:
    from lorakit.train.processes.processes import Processes
    from lorakit.train.settings.settings import TrainSettings
    from lorakit.train.settings.types import Setting


def _short(row: Setting) -> str | None:
    return f"--{row.alias.replace('_', '-')}" if row.alias else None


def brief_help() -> str:
    """Return the help for the settings that people change most, by group, in lines of at most 80 characters."""
    lines = ["Usage: lorakit train --model MODEL --data FILE... --output-dir DIR [OPTIONS]", "", _ABOUT]
    group = ""
    for name, row in DEFAULTS.items():
        if not row.brief:
            continue
        lines += [f"{row.group}:"] if row.group != group else []
        group = row.group
        flag = _short(row) or f"--{name.replace('_', '-')}"
        lines.append(f"  {flag:<30}{row.brief}{'' if row.value is ... else f' [{row.default}]'}")
    return "\n".join([*lines, _MORE])


_ABOUT = """Train an adapter and save it in a run directory. Press Ctrl-C once to finish the
step and save a checkpoint for --resume.
"""

_MORE = """
--config FILE reads settings from YAML; --nproc N starts N processes; --verbose
and --json change the output. `lorakit train --help-all` explains all settings
and the reason for each default."""


def _flags() -> type:
    """Return a dataclass with one flag per setting; a flag that is not given is None and overrides nothing."""
    titles = dict.fromkeys(row.group for row in DEFAULTS.values())
    types = types_of_settings()
    groups = {title: Group(title, sort_key=number) for number, title in enumerate(titles)}
    fields = [
        (
            name,
            Annotated[
                flag_type(types[name]) | None, Parameter(help=row.help(), alias=_short(row), group=groups[row.group])
            ],
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
    max_restarts: Annotated[
        int, Parameter(help="With --nproc, start all processes again, up to N times, after one of them was killed.")
    ] = 0,
    process_timeout: Annotated[
        int, Parameter(help="Stop the run if a process waits longer than this for another one, in seconds.")
    ] = launching.PATIENCE,
    flags: Annotated[Flags, Parameter(name="*", show_default=False)] = _NONE_GIVEN,  # type: ignore[valid-type]
) -> int:
    """Train an adapter and save it in a run directory.

    Only --model, --data and --output-dir are required; --model may be omitted with --from-adapter. Press Ctrl-C once to
    finish the step and save a checkpoint for --resume.
    """
    from lorakit.errors import UsageError

    given: dict[str, Any] = asdict(flags)
    if given["new_tokens"] is not None:  # accept "a,b" and "a b"; only a config file allows commas in tokens
        given["new_tokens"] = ",".join(given["new_tokens"])
    command = Command(given, config, json=json, verbose=verbose, max_restarts=max_restarts, timeout=process_timeout)
    try:
        command.check(nproc)
        is_one_of_several = launching.Launched.of(os.environ).count > 1
    except UsageError as cause:
        if launching.is_first(os.environ):
            raise
        return cause.exit_code
    if is_one_of_several:
        return _run_together(command)
    settings = _settings(given, config, is_restarted=launching.restarts_of(os.environ) > 0)
    if nproc is not None and nproc != 1:
        return _launch(nproc, settings, command)
    return _train(settings, json=json, verbose=verbose)


@dataclass(frozen=True)
class Command:
    """The command line.

    Attributes:
        given: Flag of a setting -> its value, None if it was not given.
        config: File of settings.
        max_restarts: How often the processes may be started again.
        timeout: Limit of the wait for another process, in seconds.
    """

    given: Mapping[str, Any]
    config: Path | None
    json: bool
    verbose: bool
    max_restarts: int
    timeout: int

    def check(self, nproc: int | None) -> None:
        """Raise UsageError if a number of processes, restarts or seconds is not allowed."""
        from lorakit.errors import UsageError

        for name, value, least in (
            ("nproc", nproc, 1),
            ("max_restarts", self.max_restarts, 0),
            ("process_timeout", self.timeout, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}.", what=value, field=name)
        if self.max_restarts and (nproc or 1) < 2:
            text = "max_restarts requires --nproc 2 or more; a launcher such as torchrun has its own --max-restarts."
            raise UsageError(text, what=self.max_restarts, field="max_restarts")


def _settings(given: Mapping[str, Any], config: Path | None, *, is_restarted: bool = False) -> TrainSettings:
    """Return the settings after checking paths, before other settings if there is no file."""
    if config is None:
        _check(given, is_restarted=is_restarted)
    from lorakit.train.settings.sources import gather  # imports pydantic

    settings = gather(given, config)
    _check(settings.as_dict(), is_restarted=is_restarted)
    return settings


def _run_together(command: Command) -> int:
    """Train in one of several processes, and return the exit code; the first process prints and reports errors."""
    launching.quiet_torch()
    from lorakit.train.processes.processes import joined

    is_silent = not launching.is_first(os.environ)
    if is_silent:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    processes = None
    try:
        with joined(command.timeout) as processes:
            with processes.together():
                settings = _settings(command.given, command.config, is_restarted=processes.restarts > 0)
            return _train(settings, json=command.json, verbose=command.verbose, processes=processes)
    except (Exception, KeyboardInterrupt) as cause:
        code = _unreported(cause, is_silent) if processes is None else _reported_elsewhere(cause, processes)
        if code is None:
            raise
        return code


def _unreported(cause: BaseException, is_silent: bool) -> int | None:
    """Return the exit code of a process that could not connect if another one tells the reason; else None."""
    from lorakit.errors import RunError

    if not isinstance(cause, RunError) or cause.field not in (launching.BROKEN, launching.UNREACHABLE):
        return None
    if launching.is_started_by_lorakit():
        return launching.LOST
    return cause.exit_code if is_silent and cause.field == launching.BROKEN else None


def _reported_elsewhere(cause: BaseException, processes: Processes) -> int | None:
    """Return the exit code of a process that has failed if another one reports the error; None if this one must."""
    from lorakit.errors import LorakitError

    is_ended = isinstance(cause, KeyboardInterrupt) or getattr(cause, "field", None) == launching.PROCESS_ENDED
    if is_ended and launching.is_started_by_lorakit():
        return launching.LOST  # the launcher reports the signal, or which process ended
    if processes.is_first:
        processes.announce_report()
        return None
    if processes.wait_for_report() or not is_ended:
        return cause.exit_code if isinstance(cause, LorakitError) else 1
    return None  # the first process has ended


def _launch(nproc: int, settings: TrainSettings, command: Command) -> int:
    """Start the same command in several processes, and return the exit code."""
    arguments = ["train", *(["--json"] if command.json else []), *(["--verbose"] if command.verbose else [])]
    arguments += [] if command.config is None else [f"--config={command.config}"]
    arguments += [f"--process-timeout={command.timeout}", *_arguments(command.given)]
    folder = settings.output_dir
    saved = (
        f"If {folder} has a checkpoint, continue from it with: lorakit train --nproc {nproc} --output-dir {folder} "
        "--resume"
    )
    return launching.launch(arguments, nproc, command.max_restarts, saved)


def _arguments(given: Mapping[str, Any]) -> list[str]:
    """Return the flags that were given as arguments of a command."""
    arguments = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}={one}" for one in (value if isinstance(value, (list, tuple)) else [value])]
    return arguments


def _train(settings: TrainSettings, *, json: bool, verbose: bool, processes: Processes | None = None) -> int:
    """Train, print the result in the first of several processes, and return the exit code."""
    from lorakit.train.settings.types import SHARDED

    notes = allocator.set_up(is_sharded=settings.parallel in SHARDED)  # before torch allocates any memory

    with rare_collections():
        from lorakit.train import run as train  # imports torch and transformers
        from lorakit.train.progress import Progress, progress_for

    is_silent = processes is not None and not processes.is_first
    progress = Progress() if is_silent else progress_for(sys.stderr if json else sys.stdout, verbose=verbose)
    for sentence in notes:
        progress.detail(sentence)
    result = train(settings, progress, processes)
    if json and not is_silent:
        console.emit_json(result.as_dict())
    elif not is_silent:
        for line in result.lines(verbose):
            console.say(line)
    return 130 if result.ending == "interrupted" else 0


def _check(settings: Mapping[str, Any], *, is_restarted: bool = False) -> None:
    """Check the given run directory, data, model and adapter paths without importing pydantic or torch."""
    folder = Path(settings["output_dir"] or "")
    is_new = not settings["resume"] and not settings["overwrite"] and not is_restarted
    if settings["output_dir"] is not None and folder.is_dir() and is_new:
        from lorakit.report import RUN_FILE
        from lorakit.train.files.run_folder import raise_run_exists

        if (folder / RUN_FILE).exists():
            raise_run_exists(folder)
    check_data([*(settings["data"] or ()), *(settings["eval_data"] or ())])
    if settings["model"] is not None:
        check_model(settings["model"], settings["revision"])
    if settings["from_adapter"] is not None and not settings["resume"]:
        find_adapter(settings["from_adapter"], "from_adapter")
