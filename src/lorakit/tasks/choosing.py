"""Choose a task for data and a model, and find the task of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorakit import hub
from lorakit.config import HEADS_BY_TASK, LoraConfig, adapter_directory, read_config
from lorakit.data import Labeled, Record, Split, Tagged, Tokenizer, padding_id
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import AdapterFileError, UsageError
from lorakit.tasks.causal_lm import CAUSAL_LM
from lorakit.tasks.classification import CLASSIFICATION
from lorakit.tasks.embedding import EMBEDDING
from lorakit.tasks.labels import KIND_BY_PROBLEM, Kind, LabelOptions, LabelType, Target
from lorakit.tasks.seq2seq import SEQ2SEQ
from lorakit.tasks.task import Objective, Task
from lorakit.tasks.token_classification import TOKEN_CLASSIFICATION

TASKS: dict[str, Task] = {
    task.name: task for task in (CAUSAL_LM, CLASSIFICATION, TOKEN_CLASSIFICATION, SEQ2SEQ, EMBEDDING)
}
"""Name of a task -> task."""


@dataclass(frozen=True)
class TaskOnData:
    """A task, and what it predicts for particular data.

    Attributes:
        task: The task.
        target: What is predicted.
        note: Message that says why this task was chosen, or "" if the user selected it.
    """

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


def task_for(name: str | None, parts: Split, source: hub.ModelSource, label_type: LabelType, given: bool) -> TaskOnData:
    """Choose the task, and read from the data what it predicts.

    Args:
        name: Name of the task; None chooses it by the shape of the data and the family of the model.
        parts: Training and evaluation records.
        source: The model.
        label_type: How labels are read; see `LabelOptions`.
        given: Whether the user passed evaluation data.

    Raises:
        UsageError: No task fits both the data and the model.
        DataError: The labels cannot be used.
        ModelError: The model's config cannot be read.
    """
    facts = hub.ModelFacts.of(source)
    family = facts.family
    task = TASKS[name] if name is not None else _by_shape(parts.train[0], family)
    if task is CAUSAL_LM and family in ("encoder", "embedding"):
        raise UsageError(
            f"{source.given}: this model does not continue text, so it cannot be trained on plain text or prompts. Use "
            "a causal language model, or data with labels, tags, or pairs of texts (see --task).",
            what=family,
            field="task",
            allowed=tuple(TASKS),
        )
    if task is SEQ2SEQ and family != "seq2seq":
        raise UsageError(
            f"{source.given}: the task seq2seq needs an encoder-decoder model such as T5; with this model, pass --task "
            "causal-lm.",
            what=task.name,
            field="task",
        )
    known = facts.named_labels if task.loader in hub.WITH_NEW_HEADS else ()
    options = LabelOptions(label_type, given, known, facts.pooling)
    note = "" if name is not None else f"task: {task.name} (from the data and the model; see --task)"
    return TaskOnData(task, task.target(parts, options), note if task is not CAUSAL_LM else "")


def _by_shape(record: Record, family: hub.Family) -> Task:
    if isinstance(record, Tagged):
        return TOKEN_CLASSIFICATION
    if isinstance(record, Labeled):
        is_pair = len(record.texts) > 1
        return EMBEDDING if is_pair and (record.label is None or family == "embedding") else CLASSIFICATION
    return SEQ2SEQ if family == "seq2seq" else CAUSAL_LM


def task_of_adapter(config: LoraConfig, training: JsonValue, outputs: int | None = None) -> TaskOnData:
    """Return the task that an adapter was trained for.

    Args:
        config: The adapter's config.
        training: The entry `training` of its `lorakit.json`, or None.
        outputs: Number of outputs of the head saved in the adapter, or None; used if no classes are recorded.

    Raises:
        UsageError: lorakit has no task for the adapter's `task_type`.
    """
    facts = training if isinstance(training, dict) else {}
    target = Target.from_dict(facts.get("labels"))
    kind = config.task_type
    task = next((one for one in TASKS.values() if one.adapter_task == kind), CAUSAL_LM if kind is None else None)
    if task is None:
        raise UsageError(
            f"the adapter's task_type is {kind}; the supported tasks are {', '.join(TASKS)}.",
            what=kind,
            field="task_type",
        )
    if target is None:
        target = Target()
        if task.loader in hub.WITH_NEW_HEADS and outputs is not None:
            names = tuple(f"LABEL_{number}" for number in range(outputs))
            kind_of: Kind = "tags" if task is TOKEN_CLASSIFICATION else "class"
            target = Target(kind_of, names) if outputs > 1 else Target("score")
    return TaskOnData(task, target)


def task_of_model(name: str | None, source: hub.ModelSource) -> TaskOnData:
    """Return the task of a model that has its own head, such as a merged model.

    Args:
        name: Name of the task; None reads it from the model's config.
        source: The model.

    Raises:
        UsageError: The model has no task that predicts rows.
        ModelError: The model's config cannot be read.
    """
    facts = hub.ModelFacts.of(source)
    found = TASKS.get(name or "") or next((task for task in TASKS.values() if task.loader == facts.loader), None)
    if found is None or found.predict is None:
        raise UsageError(
            f"{source.given}: this model does not predict rows; pass the adapter that does as --adapter, or use "
            "`lorakit generate` for a causal language model.",
            what=facts.family,
            field="adapter",
        )
    names = facts.labels if found.loader in hub.WITH_NEW_HEADS else ()
    kind: Kind = "none"
    if found is TOKEN_CLASSIFICATION:
        kind = "tags"
    elif found is CLASSIFICATION:
        kind = KIND_BY_PROBLEM.get(facts.problem or "", "score" if len(names) == 1 else "class")
    elif found is EMBEDDING:
        kind = "pairs"
    return TaskOnData(found, Target(kind, () if kind == "score" else names, facts.pooling))


def load_model_for(
    task: TaskOnData,
    source: hub.ModelSource,
    how: hub.LoadOptions | None = None,
    tokenizer: Tokenizer | None = None,
    adapters: Sequence[str | Path] | None = None,
) -> hub.LoadedModel:
    """Load a model with the head that a task needs.

    Args:
        task: The task, and what it predicts.
        source: The model.
        how: Dtype, device and quantization; None for the defaults.
        tokenizer: The model's tokenizer; its padding token is written to the config of a model with a head if the
            config has none, because such models read the last token before the padding.
        adapters: Directories of the adapters that will be loaded; None if the new modules will be trained.

    Raises:
        UsageError: The model has no head, and no adapter will be loaded.
        AdapterFileError: An adapter has no weights for a module that the model's files lack.
        LorakitError: The model cannot be loaded; see `hub.load_model`.
    """
    values = task.target.config_values()
    if values and tokenizer is not None and hub.ModelFacts.of(source).padding is None:
        values["pad_token_id"] = padding_id(tokenizer)
    loaded = hub.load_for_task(source, how, task.task.loader, values)
    for folder in adapters or ():
        _check_heads(loaded.new_modules, folder)
    if loaded.new_modules and adapters is not None and not adapters:
        raise UsageError(
            f"{source.given}: the model has no weights for {', '.join(loaded.new_modules)}; pass an adapter that has "
            "them as --adapter.",
            what=loaded.new_modules[0],
            field="adapter",
        )
    return loaded


def _check_heads(new_modules: Sequence[str], folder: str | Path) -> None:
    """Raise AdapterFileError if an adapter has no weights for a module that would otherwise keep random weights."""
    config, _ = read_config(adapter_directory(folder))
    saved = {*(config.modules_to_save or ()), *HEADS_BY_TASK.get(config.task_type, ())}
    lost = [path for path in new_modules if not any(path == name or path.endswith(f".{name}") for name in saved)]
    if lost:
        raise AdapterFileError(
            f"{folder}: the adapter has no weights for {lost[0]}, and the model's files have none, so its outputs "
            f"would be random. Train again with {lost[0]} in modules_to_save, or use the model that it was trained "
            "with.",
            what=lost[0],
            where=folder,
            field="modules_to_save",
        )
