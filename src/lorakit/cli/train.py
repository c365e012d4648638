"""`lorakit train`: train an adapter.

The flags are the fields of `TrainSettings`, generated from its table of defaults; `lorakit.train` defines their effect.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lorakit import allocator
from lorakit.cli import console
from lorakit.cli.early import check_data, check_model
from lorakit.train.defaults import DEFAULTS
from lorakit.train.settings import TrainSettings

_LISTS = frozenset({"data", "eval_data", "target_modules", "learning_rate_pattern", "new_tokens"})


def _flag_type(name: str) -> Any:
    if name in _LISTS:
        return list[str]
    wanted = TrainSettings.model_fields[name].annotation
    for plain in (bool, int, float):
        if wanted is plain or wanted == plain | None:
            return plain
    return str


def _flags() -> type:
    """One optional flag per setting; None means not given, so that a file or the defaults decide.

    A dataclass: another pydantic model would take a tenth of a second at start-up.
    """
    fields = [
        (name, Annotated[_flag_type(name) | None, Parameter(help=row.help())], field(default=None))
        for name, row in DEFAULTS.items()
    ]
    return make_dataclass("Flags", fields, frozen=True, namespace={"__module__": __name__})


Flags = _flags()
_NONE_GIVEN = Flags()


def run(
    *,
    config: Annotated[Path | None, Parameter(help="YAML file of settings by flag name; flags override it.")] = None,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
    flags: Annotated[Flags, Parameter(name="*", show_default=False)] = _NONE_GIVEN,  # type: ignore[valid-type]
) -> int:
    """Train an adapter into a run directory.

    Only --model, --data and --output-dir are required. Ctrl-C once finishes the step and saves a checkpoint for
    --resume.
    """
    from lorakit.train.settings_sources import gather

    given: dict[str, Any] = asdict(flags)
    if given.get("new_tokens") is not None:  # "a,b" and "a b" alike; a token with a comma in it needs a file
        given["new_tokens"] = ",".join(given["new_tokens"])
    settings = gather(given, config)
    _check(settings)
    notes = allocator.set_up()  # before torch allocates any memory

    from lorakit.train import run as train  # torch and transformers, after the settings have been checked
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


def _check(settings: TrainSettings) -> None:
    """Check what needs no torch: data, model and the run directory."""
    from lorakit.report import RUN_FILE
    from lorakit.train.run_folder import raise_run_exists

    folder = Path(settings.output_dir)
    if not settings.resume and not settings.overwrite and (folder / RUN_FILE).exists():
        raise_run_exists(folder)
    check_data([*settings.data, *(settings.eval_data or ())])
    check_model(settings.model)
