"""Shared code for commands that take adapters: override flags, adapter loading, tokenizers and reports.

This module does not depend on what a command does with the adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.errors import LorakitError
from lorakit.plan.job import ASSUMED_LENGTH

if TYPE_CHECKING:
    from lorakit.core import AdapterFiles, OperationReport

Item = TypeVar("Item")

NAME = "Adapter directory or Hub id (owner/name[@revision])"
NAMES = "Adapter directories or Hub ids (owner/name[@revision])"
"""Beginning of the help texts of flags that take adapters."""

ModelFlag = Annotated[
    str | None,
    Parameter(
        help="Model directory, GGUF file, Hub id, or smollm2 (the packaged model). Default: the base that --adapter "
        "names."
    ),
]
"""Flag for the base, which adapters name."""

LengthFlag = Annotated[
    int | None,
    Parameter(
        help="Maximum sequence length in tokens. Default: that of the adapter's training; else by the data (eval), or "
        f"{ASSUMED_LENGTH} (predict)."
    ),
]

WORST_SITES = 5
"""Maximum number of rows in a table of the worst sites."""


@dataclass(frozen=True)
class Allowances:
    """Flags that override checks, one per check."""

    allow_base_mismatch: Annotated[bool, Parameter(negative=(), help="Accept an adapter trained on another base.")] = (
        False
    )
    allow_key_mismatch: Annotated[
        bool, Parameter(negative=(), help="Load the tensors that match and skip the others.")
    ] = False
    allow_nonfinite: Annotated[
        bool, Parameter(negative=(), help="Accept an adapter that has NaN or infinite values.")
    ] = False
    allow_odd_scale: Annotated[
        bool, Parameter(negative=(), help="Accept an adapter whose scale is 0, negative or above 1000.")
    ] = False


NONE_ALLOWED = Allowances()
"""Default value of a command's `allow` parameter."""


def overridden(flags: Mapping[str, Any]) -> list[str]:
    """Return the names (as in `lorakit.core`) of the checks that the `allow_` flags override."""
    return [name.removeprefix("allow_") for name, given in flags.items() if given and name.startswith("allow_")]


def read_adapters(folders: Sequence[str]) -> list[AdapterFiles]:
    """Read adapters before the base model is loaded, so that errors in their files are reported immediately.

    Raises:
        AdapterFileError: An adapter directory is missing, or its files are damaged.
    """
    from lorakit import core

    return [core.read_adapter(folder) for folder in folders]


@contextlib.contextmanager
def naming_flags(flags: type | None = None) -> Iterator[None]:
    """Return a context manager that adds to the message of a failed check the flag that overrides the check.

    `flags` is the dataclass of the command's flags; None means `Allowances`.

    Raises:
        LorakitError: The error raised within the context, with the flag in its message.
    """
    try:
        yield
    except LorakitError as error:
        name = f"allow_{error.override}"
        if error.advice is None or name not in {field.name for field in fields(flags or Allowances)}:
            raise
        raise type(error)(error.text(f"pass --{name.replace('_', '-')}"), **error.fields) from error


def copy_tokenizer(adapters: Sequence[AdapterFiles], folder: Path) -> None:
    """Copy the tokenizer to the new adapter if all original adapters have the same tokenizer files."""
    from lorakit.durable import write_bytes
    from lorakit.hub import tokenizer_contents

    tokenizers = [tokenizer_contents(files.folder) for files in adapters]
    if all(other == tokenizers[0] for other in tokenizers):
        for name, content in tokenizers[0].items():
            write_bytes(folder / name, content)


def by_name(items: Iterable[Item], name: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Return a dict from names to lists of items; names and items keep their order."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(name(item), []).append(item)
    return groups


def print_report(report: OperationReport, lines: Sequence[str], output_dir: Path, as_json: bool) -> None:
    """Print the report of an operation on adapters as JSON, or its lines and the directory of the new adapter."""
    if as_json:
        console.emit_json({"output_dir": str(output_dir), **report.as_dict()})
    else:
        console.say("\n".join(lines))
