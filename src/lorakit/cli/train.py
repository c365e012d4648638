"""`lorakit train`: adapt a model to data.

The flags are the fields of `TrainSettings`, made from its table of defaults; what they do is in `lorakit.train`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, create_model

from lorakit import allocator
from lorakit.cli import console
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


def _flags() -> type[BaseModel]:
    """One optional flag per setting; None means not given, so that a file or the defaults can say."""
    fields: dict[str, Any] = {
        name: (_flag_type(name) | None, Field(None, description=row.help())) for name, row in DEFAULTS.items()
    }
    return create_model("Flags", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)


Flags = _flags()


def run(
    *,
    config: Annotated[Path | None, Parameter(help="YAML file of settings by flag name; flags win over it.")] = None,
    json: console.JsonFlag = False,
    flags: Annotated[Flags | None, Parameter(name="*", show_default=False)] = None,  # type: ignore[valid-type]
) -> int:
    """Adapt a model to data; the run is kept as a folder.

    Only --model, --data and --output-dir are needed. Ctrl-C once finishes the step and saves a checkpoint for --resume.
    """
    from lorakit.train.settings_sources import gather

    given: dict[str, Any] = flags.model_dump() if flags is not None else {}
    if given.get("new_tokens") is not None:  # "a,b" and "a b" alike; a token with a comma in it needs a file
        given["new_tokens"] = ",".join(given["new_tokens"])
    settings = gather(given, config)

    said = allocator.set_up()  # before torch takes any memory

    from lorakit.train import run as train  # torch and transformers, after the settings are known to be right
    from lorakit.train.progress import progress_for

    progress = progress_for(sys.stderr if json else sys.stdout)
    for sentence in said:
        progress.say(sentence)
    result = train(settings, progress)
    if json:
        console.emit_json(result.as_dict())
    else:
        for line in result.lines():
            console.say(line)
    return 130 if result.ending == "interrupted" else 0
