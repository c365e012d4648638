"""Choose a task for data and a model, and find the task of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit import hub
from lorakit.config import HEADS_BY_TASK, LoraConfig, read_config
from lorakit.data import AnyRecords, Labeled, Record, Records, Split, Tagged, Tokenizer
from lorakit.durable import JsonObject, JsonValue, as_object
from lorakit.errors import AdapterFileError, ModelError, UsageError
from lorakit.tasks.causal_lm import CAUSAL_LM
from lorakit.tasks.classification import CLASSIFICATION, TOKEN_CLASSIFICATION
from lorakit.tasks.embedding import EMBEDDING
from lorakit.tasks.seq2seq import SEQ2SEQ
from lorakit.tasks.target import KIND_BY_PROBLEM, Kind, LabelOptions, Target, default_names
from lorakit.tasks.task import Objective, Task

TASKS: dict[str, Task] = {
    task.name: task for task in (CAUSAL_LM, CLASSIFICATION, TOKEN_CLASSIFICATION, SEQ2SEQ, EMBEDDING)
}
"""Name of a task -> task."""


@dataclass(frozen=True)
class TaskOnData:
    """A task, what it predicts for particular data, and a note why it was chosen ("" if the user selected it)."""

    task: Task
    target: Target
    note: str = ""

    @cached_property
    def objective(self) -> Objective:
        """The loss and the metrics."""
        return self.task.objective(self.target)

    def as_dict(self) -> JsonObject:
        """Return the task and the target as plain JSON values, for `lorakit.json` and `run.json`."""
        return {"task": self.task.name, **({"labels": self.target.as_dict()} if self.target.kind != "none" else {})}


def task_for(
    name: str | None,
    parts: Split,
    source: hub.ModelSource,
    options: LabelOptions | None = None,
    saved: TaskOnData | None = None,
) -> TaskOnData:
    """Choose the task, and find what it predicts: as saved, or as read from the data.

    Args:
        name: Name of the task; None chooses it by the shape of the data and the family of the model.
        parts: Training and evaluation records.
        source: The model.
        options: How labels are read; the facts about the model are added.
        saved: The task of an adapter or a run, whose classes the data must have; None for a new one.

    Raises:
        UsageError: No task fits both the data and the model, or an option about labels does not apply.
        DataError: The labels cannot be used, or are not among the saved ones.
        ConfigError: The label map or the tag scheme does not fit the saved labels.
        ModelError: The model's config cannot be read.
    """
    facts, options = hub.ModelFacts.of(source), options or LabelOptions()
    family = facts.family
    name = name if saved is None else saved.task.name
    task = TASKS[name] if name is not None else _by_shape(parts.train[0], family)
    if task is CAUSAL_LM and family in ("encoder", "embedding"):
        text = (
            f"{source.given}: this model does not continue text, so it cannot be trained on plain text or prompts. Use "
            "a causal language model, or data with labels, tags, or pairs of texts (see --task)."
        )
        raise UsageError(text, what=family, field="task", allowed=tuple(TASKS))
    if task is SEQ2SEQ and family != "seq2seq":
        text = (
            f"{source.given}: the task seq2seq needs an encoder-decoder model such as T5; with this model, pass --task "
            "causal-lm."
        )
        raise UsageError(text, what=task.name, field="task")
    recorded_target = Target() if saved is None else named_as(saved, facts).target
    if task.has_head and recorded_target.kind != "none":
        target = recorded_target.with_options(options)
        target.check(parts.training_records())
        target.check(parts.held_out)
        return TaskOnData(task, target)
    target = task.target(parts, replace(options, known=_own_head(task, facts).names))
    options.check_kind(target.kind)
    recorded = {} if saved is None else saved.target.embedding
    note = "" if name is not None else f"task: {task.name} (from the data and the model; see --task)"
    target = replace(target, embedding=recorded)
    return on_model(TaskOnData(task, target, note if task is not CAUSAL_LM else ""), source)


def on_model(task: TaskOnData, source: hub.ModelSource) -> TaskOnData:
    """Return a task with what it reads from a model's files, such as how the model embeds texts.

    Raises:
        LorakitError: The files do not fit the task, or the adapter was trained on another model.
    """
    return replace(task, target=task.task.on_model(task.target, source))


def task_to_measure(records: AnyRecords, source: hub.ModelSource, options: LabelOptions) -> TaskOnData:
    """Choose the task of a model that is measured without adapters; its own head decides which classes there are.

    Raises:
        LorakitError: See `task_for`.
    """
    facts = hub.ModelFacts.of(source)
    task = _by_shape(records[0], facts.family)
    with_head = TaskOnData(task, _own_head(task, facts)) if task.has_head else None
    return task_for(None, Split(records, Records(), ""), source, options, with_head)


def named_as(task: TaskOnData, facts: hub.ModelFacts) -> TaskOnData:
    """Return the task of an adapter; if its files do not name the classes, they are those of the base's own head."""
    target = task.target
    head = _own_head(task.task, facts) if target.kind == "none" or target.has_default_names else Target()
    is_same = target.kind == "none" or len(head.names) == len(target.names)
    return replace(task, target=head) if is_same and head.kind != "none" else task


def _own_head(task: Task, facts: hub.ModelFacts) -> Target:
    """Return what the model's own head predicts; nothing if the model has no head for the task.

    Raises:
        ModelError: Two classes have the same name, or the ids of the classes are not 0 to n-1.
    """
    if not task.has_head or task.loader != facts.loader:
        return Target()
    if facts.label_ids != tuple(range(len(facts.labels))):
        text = (
            f"the ids of the classes in the config (id2label: {', '.join(map(str, facts.label_ids[:10]))}) must "
            f"be 0 to {len(facts.labels) - 1}, the positions of the model's outputs; name every output."
        )
        raise ModelError(text, what=str(facts.label_ids[0]), field="id2label")
    if len(set(facts.labels)) < len(facts.labels):
        text = (
            f"several classes of the model have the same name in its config (id2label: {', '.join(facts.labels[:10])});"
            " give each class its own name."
        )
        raise ModelError(text, what=facts.labels[0], field="id2label")
    if task is TOKEN_CLASSIFICATION:
        return Target("tags", facts.labels)
    kind = KIND_BY_PROBLEM.get(facts.problem or "", "score" if len(facts.labels) == 1 else "class")
    return Target(kind, () if kind == "score" else facts.labels)


def _by_shape(record: Record, family: hub.Family) -> Task:
    if isinstance(record, Tagged):
        return TOKEN_CLASSIFICATION
    if isinstance(record, Labeled):
        is_pair = len(record.texts) > 1
        return EMBEDDING if is_pair and (record.label is None or family == "embedding") else CLASSIFICATION
    return SEQ2SEQ if family == "seq2seq" else CAUSAL_LM


def task_of_adapter(config: LoraConfig, training: JsonValue, outputs: int | None = None) -> TaskOnData:
    """Return the task that an adapter was trained for, from its config and `training` of its `lorakit.json`.

    The number of outputs of its saved head is used if no classes are recorded.

    Raises:
        UsageError: lorakit has no task for the adapter's `task_type`.
    """
    labels = as_object(training).get("labels")
    target = Target.from_dict(labels)
    kind = config.task_type
    task = next((one for one in TASKS.values() if one.adapter_task == kind), CAUSAL_LM if kind is None else None)
    if task is None:
        text = f"the adapter's task_type is {kind}; the supported tasks are {', '.join(TASKS)}."
        raise UsageError(text, what=kind, field="task_type")
    if target is not None and task.loader == "encoder" and not target.embedding and isinstance(labels, dict):
        target = replace(target, embedding={"pooling": labels.get("pooling", "mean")})  # as recorded before
    if target is None:
        target = Target()
        if task.has_head and outputs is not None:
            kind_of: Kind = "tags" if task is TOKEN_CLASSIFICATION else "class"
            target = Target(kind_of, default_names(outputs)) if outputs > 1 else Target("score")
    return TaskOnData(task, target)


def task_of_model(name: str | None, source: hub.ModelSource) -> TaskOnData:
    """Return the named task of a model without adapters, or that of the model's own head, as in its config.

    Raises:
        UsageError: The model neither continues text nor predicts rows.
        ModelError: The model's config cannot be read.
    """
    if name == CAUSAL_LM.name:  # reads no file
        return TaskOnData(CAUSAL_LM, Target())
    facts = hub.ModelFacts.of(source)
    chosen = TASKS.get(name or "") or next((task for task in TASKS.values() if task.loader == facts.loader), None)
    if chosen is None:
        text = f"{source.given}: this model has no head that predicts rows; pass the adapter that does as --adapter."
        raise UsageError(text, what=facts.family, field="adapter")
    if chosen is CAUSAL_LM:
        return TaskOnData(CAUSAL_LM, Target())
    if not chosen.has_head:
        return on_model(TaskOnData(chosen, Target("pairs" if chosen is EMBEDDING else "none")), source)
    return TaskOnData(chosen, _own_head(chosen, replace(facts, loader=chosen.loader)))


def agree_on_padding(
    task: TaskOnData,
    source: hub.ModelSource,
    tokenizers: Sequence[Tokenizer],
    loaded: hub.LoadedModel | None = None,
) -> int:
    """Set the padding token of a task's rows in the tokenizers and the model; see `hub.agree_on_padding`.

    Raises:
        ModelError: A row's outputs would depend on its padding.
    """
    known: Any = tokenizers  # transformers tokenizers
    return hub.agree_on_padding(source, known, None if loaded is None else loaded.model, task.task.loader)


def load_model_for(
    task: TaskOnData,
    source: hub.ModelSource,
    how: hub.LoadOptions | None = None,
    tokenizer: Tokenizer | None = None,
    adapters: Sequence[str | Path] | None = None,
) -> hub.LoadedModel:
    """Load a model with the head that a task needs; `adapters` will be loaded, or None if new modules are trained.

    Raises:
        UsageError: The model has no head, and no adapter will be loaded.
        AdapterFileError: An adapter has no weights for a module that the model's files lack.
        LorakitError: The model cannot be loaded; see `hub.load_model`.
    """
    loaded = hub.load_for_task(source, how, task.task.loader, task.target.config_values())
    if tokenizer is not None:
        agree_on_padding(task, source, [tokenizer], loaded)
    for folder in adapters or ():
        _check_heads(loaded.new_modules, folder)
    if loaded.new_modules and adapters is not None and not adapters:
        text = (
            f"{source.given}: the model has no weights for {', '.join(loaded.new_modules)}; pass an adapter that has "
            "them as --adapter."
        )
        raise UsageError(text, what=loaded.new_modules[0], field="adapter")
    return loaded


def _check_heads(new_modules: Sequence[str], folder: str | Path) -> None:
    """Raise AdapterFileError if an adapter has no weights for a module that would otherwise keep random weights."""
    config, _ = read_config(folder)
    saved = {*(config.modules_to_save or ()), *HEADS_BY_TASK.get(config.task_type, ())}
    lost = [path for path in new_modules if not any(path == name or path.endswith(f".{name}") for name in saved)]
    if lost:
        text = (
            f"{folder}: the adapter has no weights for {lost[0]}, and the model's files have none, so its outputs "
            f"would be random. Train again with {lost[0]} in modules_to_save, or use the model that it was trained "
            "with."
        )
        raise AdapterFileError(text, what=lost[0], where=folder, field="modules_to_save")
