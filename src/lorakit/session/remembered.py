"""What the files of adapters record: their base, and the task that they were trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit import hub
from lorakit.config import LoraConfig
from lorakit.core import AdapterFiles
from lorakit.errors import ModelError, UsageError
from lorakit.tasks import TaskOnData, task_of_adapter


def recorded_base(folder: Path, config: LoraConfig, facts: Mapping[str, Any]) -> str:
    """Return the name of the base that an adapter was trained on, from its config or its `lorakit.json`.

    Raises:
        UsageError: The adapter does not name its base.
    """
    found = hub.base_named(config.base_model_name_or_path, facts.get("base_name"), folder)
    if found is None:
        raise UsageError(
            f"{folder}: the adapter does not name its base (base_model_name_or_path); pass --model.",
            where=folder,
            field="model",
        )
    return found


def resolve_base(base: str, given: str | None, adapter: object, say: Callable[[str], None]) -> hub.ModelSource:
    """Resolve the base of an adapter; if only the adapter names it (`given` is None), an error says so.

    Raises:
        ModelError: The base was not found.
    """
    try:
        return hub.resolve(base, say)
    except ModelError as cause:
        if given is not None:
            raise
        text = f"{cause} The adapter {adapter} names this base; pass --model if it is somewhere else."
        raise ModelError(text, **{**cause.fields, "field": "model"}) from cause


def task_of(adapters: Sequence[AdapterFiles]) -> TaskOnData:
    """Return the task that adapters, at least one, were trained for.

    Raises:
        UsageError: The adapters have different tasks or classes, or rename labels differently, or the task is unknown.
    """
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
