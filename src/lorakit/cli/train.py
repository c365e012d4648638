"""`lorakit train`: train an adapter.

The flags are generated from the table of settings; `lorakit.train` defines their effect. Paths on the command line are
checked before the other settings, because checking the other settings loads pydantic.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lorakit import allocator
from lorakit.cli import console
from lorakit.cli.early import check_data, check_model, check_start
from lorakit.train.defaults import ALIASES, DEFAULTS


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
    flags: Annotated[Flags, Parameter(name="*", show_default=False)] = _NONE_GIVEN,  # type: ignore[valid-type]
) -> int:
    """Train an adapter and save it in a run directory.

    Only --model, --data and --output-dir are required; --model may be omitted with --from-adapter. Press Ctrl-C once to
    finish the step and save a checkpoint for --resume.
    """
    given: dict[str, Any] = asdict(flags)
    if given["new_tokens"] is not None:  # accept "a,b" and "a b"; only a config file allows commas in tokens
        given["new_tokens"] = ",".join(given["new_tokens"])
    if config is None:
        _check(given)
    from lorakit.train.settings_sources import gather  # imports pydantic

    settings = gather(given, config)
    _check(settings.as_dict())
    notes = allocator.set_up()  # before torch allocates any memory

    from lorakit.train import run as train  # imports torch and transformers
    from lorakit.train.progress import progress_for

    progress = progress_for(sys.stderr if json else sys.stdout, verbose=verbose)
    for sentence in notes:
        progress.detail(sentence)
    result = train(settings, progress)
    if json:
        console.emit_json(result.as_dict())
    else:
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
