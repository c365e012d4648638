"""`lorakit convert-config`: convert a settings file of another tool to settings of `lorakit train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.errors import UsageError


def run(
    file: Annotated[
        Path, Parameter(help="YAML or JSON file of Axolotl, LLaMA-Factory or mlx-lm, or PEFT's adapter_config.json.")
    ],
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(name=("--output", "-o"), help="YAML file to write; must not exist. Default: print the settings."),
    ] = None,
    json: console.JsonFlag = False,
) -> None:
    """Convert a settings file of another tool to a YAML file for `lorakit train --config`.

    The tool is recognized by the keys. The report lists keys whose meaning differs, keys without a counterpart, and
    required settings that are missing. No model or data is read, and nothing in the file is evaluated.

    Raises:
        UsageError: The output file exists.
    """
    if output is not None and output.exists():
        raise UsageError(f"{output}: exists and will not be overwritten; pass a new file as --output.", where=output)
    from lorakit.durable import write_text
    from lorakit.train.settings.conversion.converting import convert_file  # imports pydantic

    conversion = convert_file(file)
    if output is not None:
        write_text(output, conversion.text())
    if json:
        console.emit_json({**asdict(conversion), "source": str(conversion.source), "output": output and str(output)})
    elif output is None:
        console.say(conversion.text().rstrip())
    else:
        console.say(f"{output}: settings for lorakit train, converted from the {conversion.tool} file {file}")
        for line in conversion.lines():
            console.say(f"  {line}")
