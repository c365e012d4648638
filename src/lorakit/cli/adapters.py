"""Shared code for commands that take adapters: override flags, adapter loading, tokenizers and reports.

This module does not depend on what a command does with the adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.errors import LorakitError
from lorakit.train.defaults import ASSUMED_LENGTH

if TYPE_CHECKING:
    from torch import nn

    from lorakit.core import AdapterFiles, OperationReport
    from lorakit.durable import JsonObject
    from lorakit.hub import ModelSource
    from lorakit.plan.quantized import Quantization
    from lorakit.tasks import TaskOnData
    from lorakit.train.forecast import SavedTokenizer

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

MERGED_FILE = "lorakit_merged.json"
"""Name of the file that records the origin of a merged model."""

MOST_MERGED_BYTES = 16 << 20

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

    Args:
        folders: Adapter directories as given by the user.

    Returns:
        The files of each adapter, in the order of `folders`.

    Raises:
        AdapterFileError: An adapter directory is missing, or its files are damaged.
    """
    from lorakit import core

    return [core.read_adapter(folder) for folder in folders]


@dataclass(frozen=True)
class Remembered:
    """What adapters, or a model that was merged from them, record: their base, and how they were trained.

    Attributes:
        source: The base, or the merged model.
        facts: Contents of each `lorakit.json`, or of `lorakit_merged.json`; empty if nothing is recorded.
    """

    source: ModelSource
    facts: Sequence[Mapping[str, Any]]

    @property
    def trainings(self) -> list[JsonObject]:
        """The metadata of each training."""
        found = [one.get("training") for one in self.facts]
        return [one for one in found if isinstance(one, dict)]

    @property
    def rows(self) -> JsonObject | None:
        """The shape and the columns of the training data, or None if they are unknown or differ."""
        found = [{name: one.get(name) for name in ("shape", "columns")} for one in self.trainings]
        return found[0] if found and all(one == found[0] for one in found) else None

    def max_length(self, given: int | None) -> int | None:
        """Return the maximum sequence length: the given one, else the longest of the trainings, else None."""
        found = [length for one in self.trainings if isinstance(length := one.get("max_length"), int) and length > 1]
        return given if given is not None else max(found, default=None)


def remembered(model: str | None, adapters: Sequence[AdapterFiles], revision: str | None = None) -> Remembered:
    """Resolve the base, which adapters name if the user does not, and return what the adapters record.

    Args:
        model: The value of `--model`, from `early.check_base`.
        adapters: Files of the adapters.
        revision: The value of `--revision`, for a base that only the adapters name.

    Raises:
        UsageError: The adapters name different bases, or none.
        ModelError: The base was not found.
    """
    from lorakit.durable import read_json
    from lorakit.train.start_adapter import resolve_base

    source = resolve_base(model or _base_of(adapters, revision), model, _names(adapters), console.note)
    if adapters:
        return Remembered(source, [files.sidecar.facts for files in adapters])
    record = Path(source.path_or_id) / MERGED_FILE
    found = read_json(record, MOST_MERGED_BYTES) if source.kind == "directory" and record.is_file() else None
    return Remembered(source, [found] if isinstance(found, dict) else [])


def _base_of(adapters: Sequence[AdapterFiles], revision: str | None) -> str:
    """Return the base that all adapters name, with the given revision, or else the one that they record."""
    from lorakit.errors import UsageError
    from lorakit.hub_cache import is_on_hub, with_revision
    from lorakit.train.start_adapter import recorded_base

    found = {}
    for files in adapters:
        base = recorded_base(files.folder, files.config, files.sidecar.facts)
        recorded = files.config.revision if is_on_hub(base) else None
        found[with_revision(base, revision or recorded)] = files.folder
    if len(found) > 1:
        named = " and ".join(f"{base} ({folder})" for base, folder in found.items())
        raise UsageError(f"the adapters name different bases: {named}; pass --model.", field="model")
    return next(iter(found))


def _names(adapters: Sequence[AdapterFiles]) -> str:
    return ", ".join(str(files.folder) for files in adapters)


def load_adapters(model: nn.Module, adapters: Sequence[AdapterFiles], allow: Collection[str]) -> list[str]:
    """Load adapters into a model, largest vocabulary first, because only a base without adapters can be resized.

    Args:
        model: The base.
        adapters: The adapters' files.
        allow: Checks to override, from `overridden`.

    Returns:
        Names of the loaded adapters, in the order of `adapters`.

    Raises:
        LorakitError: Raised by `core.load_adapter`; the message names the flag that overrides the failed check, if any.
    """
    from lorakit import core

    names = [f"adapter_{number}" for number, _ in enumerate(adapters, start=1)]
    with naming_flags():
        for name, files in sorted(zip(names, adapters, strict=True), key=lambda pair: -pair[1].vocabulary):
            core.load_adapter(model, files, name, allow=allow)
    return names


@contextlib.contextmanager
def naming_flags(flags: type | None = None) -> Iterator[None]:
    """Return a context manager that extends a failed check's error message with the flag that overrides the check.

    Args:
        flags: Dataclass of the command's flags; None means `Allowances`.

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


def task_of(adapters: Sequence[AdapterFiles]) -> TaskOnData:
    """Return the task that adapters were trained for.

    Args:
        adapters: Files of the adapters, at least one.

    Raises:
        UsageError: The adapters have different tasks or classes, rename labels differently, or have a task that lorakit
            lacks.
    """
    from dataclasses import replace

    from lorakit.errors import UsageError
    from lorakit.tasks import task_of_adapter

    first, *others = [
        task_of_adapter(files.config, files.sidecar.facts.get("training"), files.head_outputs) for files in adapters
    ]
    for files, other in zip(adapters[1:], others, strict=True):
        if (other.task, other.target) != (first.task, first.target):
            raise UsageError(
                f"{files.folder}: trained for {_described(other)}, but {adapters[0].folder} for {_described(first)}; "
                "pass adapters for the same task, with the same classes in the same order.",
                where=files.folder,
                field="adapter",
            )
    return replace(first, target=replace(first.target, label_map=_label_map(adapters, [first, *others])))


def _label_map(adapters: Sequence[AdapterFiles], tasks: Sequence[TaskOnData]) -> dict[str, str]:
    """Return the label maps of adapters as one; a label that they rename differently is an error."""
    from lorakit.errors import UsageError

    found = dict[str, str]()
    for files, task in zip(adapters, tasks, strict=True):
        for name, known in task.target.label_map.items():
            if found.setdefault(name, known) != known:
                raise UsageError(
                    f"{files.folder}: reads the label {name!r} as {known!r}, but another adapter as {found[name]!r}; "
                    "measure them in separate calls.",
                    what=name,
                    where=files.folder,
                    field="adapter",
                )
    return found


def _described(task: TaskOnData) -> str:
    names = ", ".join(task.target.names[:10])
    return f"{task.task.name} ({names})" if names else task.task.name


def check_generates(adapters: Sequence[AdapterFiles]) -> None:
    """Check that adapters were trained for a task that continues text.

    Args:
        adapters: Files of the adapters.

    Raises:
        UsageError: An adapter was trained for another task.
    """
    from lorakit.errors import UsageError

    task = task_of(adapters).task if adapters else None
    if task is not None and not task.generates:
        raise UsageError(
            f"{adapters[0].folder}: trained for {task.name}, which does not continue text; use `lorakit predict`.",
            what=task.name,
            where=adapters[0].folder,
            field="adapter",
        )


LARGEST_TOKENIZER_BYTES = 256 << 20


def copy_tokenizer(adapters: Sequence[AdapterFiles], folder: Path) -> None:
    """Copy the tokenizer to the new adapter if all original adapters have the same tokenizer files.

    Args:
        adapters: Files of the original adapters.
        folder: Directory of the new adapter.
    """
    from lorakit.durable import read_bytes, write_bytes
    from lorakit.hub import tokenizer_files

    found = []
    for files in adapters:
        paths = tokenizer_files(files.folder)
        found.append({path.name: read_bytes(path, LARGEST_TOKENIZER_BYTES) for path in paths})
    if all(other == found[0] for other in found):
        for name, content in found[0].items():
            write_bytes(folder / name, content)


def tokenizer_for(source: ModelSource, adapters: Sequence[AdapterFiles]) -> SavedTokenizer:
    """Return the tokenizer to use, preferably the one that the adapters were trained and saved with.

    Args:
        source: The source of the base model.
        adapters: Files of the adapters.

    Returns:
        The saved tokenizer that contains all tokens of the other saved tokenizers, if there is one and all have the
            same chat template; otherwise, the model's tokenizer.

    Raises:
        ModelError: Neither the model nor the adapters have a tokenizer, or the tokenizer cannot be read.
    """
    from lorakit import hub

    found = [own for files in adapters if (own := hub.adapter_tokenizer(files.folder)) is not None]
    distinct = {(hub.tokenizer_hash(own), hub.chat_template_hash(own)): own for own in found}
    largest = _largest(list(distinct.values()))
    if largest is not None:
        return largest
    if found:
        console.warning("the adapters have different tokenizers or chat templates; using the model's tokenizer.")
    return hub.load_tokenizer(source)


def _largest(tokenizers: Sequence[SavedTokenizer]) -> SavedTokenizer | None:
    """Return the tokenizer that contains the others' tokens and ids; None if there is none or chat templates differ."""
    tokens = [set(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    for tokenizer, own in zip(tokenizers, tokens, strict=True):
        if all(own >= other for other in tokens) and all(
            t.chat_template == tokenizer.chat_template for t in tokenizers
        ):
            return tokenizer
    return None


def report_training_quantization(adapters: Sequence[AdapterFiles], wanted: Quantization | None) -> None:
    """Print a note for each adapter trained on a quantized base, unless this command quantizes the base the same way.

    Args:
        adapters: The adapters.
        wanted: Quantization of the base in this command, or None.
    """
    now = "not quantized" if wanted is None else f"quantized as {wanted.name}"
    for files in adapters:
        training = files.sidecar.facts.get("training")
        stored = training.get("quantization") if isinstance(training, dict) else None
        method = stored.get("method") if isinstance(stored, dict) else None
        if method is not None and (wanted is None or method != wanted.name):
            console.note(
                f"{files.folder}: trained on a base quantized as {method}, but this base is {now}; "
                f"pass --quantization {method} to use the same weights as in training."
            )


def by_name(items: Iterable[Item], name: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Return a dict from names to lists of items; names and items keep their order.

    Args:
        items: The items, such as the sites of an adapter.
        name: Function that returns the name of an item's group.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(name(item), []).append(item)
    return groups


def print_report(report: OperationReport, lines: Sequence[str], output_dir: Path, as_json: bool) -> None:
    """Print the report of an operation on adapters.

    Args:
        report: The report's values, for the JSON document.
        lines: Lines of the report as text.
        output_dir: Directory of the new adapter.
        as_json: Whether to print JSON instead of text.
    """
    if as_json:
        console.emit_json({"output_dir": str(output_dir), **report.as_dict()})
    else:
        console.say("\n".join(lines))
