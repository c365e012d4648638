"""Choose a task for data and a model, and find the task of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lorakit import hub
from lorakit.config import LoraConfig
from lorakit.data import Labeled, Record, Split, Tagged
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import UsageError
from lorakit.tasks.causal_lm import CAUSAL_LM
from lorakit.tasks.classification import CLASSIFICATION
from lorakit.tasks.embedding import EMBEDDING
from lorakit.tasks.labels import LabelOptions, LabelType, Target
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
    family = hub.family_of(source)
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
    known = hub.labels_of(source) if task.loader in hub.WITH_NEW_HEADS else ()
    options = LabelOptions(label_type, given, known, hub.pooling_of(source))
    note = "" if name is not None else f"task: {task.name} (from the data and the model; see --task)"
    return TaskOnData(task, task.target(parts, options), note if task is not CAUSAL_LM else "")


def _by_shape(record: Record, family: hub.Family) -> Task:
    if isinstance(record, Tagged):
        return TOKEN_CLASSIFICATION
    if isinstance(record, Labeled):
        is_pair = len(record.texts) > 1
        return EMBEDDING if is_pair and (record.label is None or family == "embedding") else CLASSIFICATION
    return SEQ2SEQ if family == "seq2seq" else CAUSAL_LM


def task_of_adapter(config: LoraConfig, training: JsonValue, heads: Sequence[int]) -> TaskOnData:
    """Return the task that an adapter was trained for.

    Args:
        config: The adapter's config.
        training: The entry `training` of its `lorakit.json`, or None.
        heads: Numbers of outputs of the heads saved in the adapter, for adapters without names of classes.

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
        if task.loader in hub.WITH_NEW_HEADS and heads:
            names = tuple(f"LABEL_{number}" for number in range(heads[0]))
            target = Target("tags", names) if task is TOKEN_CLASSIFICATION else Target("class", names)
            target = target if heads[0] > 1 else Target("score")
    return TaskOnData(task, target)
