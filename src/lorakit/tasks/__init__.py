"""Tasks that a model can be trained for: what the data must have, how it is encoded, the loss, and the metrics."""

from __future__ import annotations

from lorakit.tasks.causal_lm import CAUSAL_LM, loss_sum
from lorakit.tasks.choosing import (
    TASKS,
    TaskOnData,
    agree_on_padding,
    load_model_for,
    named_as,
    on_model,
    task_for,
    task_of_adapter,
    task_of_model,
    task_to_measure,
)
from lorakit.tasks.target import LabelOptions, Target
from lorakit.tasks.task import (
    EncodeOptions,
    LossSum,
    Meter,
    Metrics,
    Objective,
    PredictContext,
    Task,
    evaluation_batches,
    evaluation_order,
)

__all__ = [
    "CAUSAL_LM",
    "TASKS",
    "EncodeOptions",
    "LabelOptions",
    "LossSum",
    "Meter",
    "Metrics",
    "Objective",
    "PredictContext",
    "Target",
    "Task",
    "TaskOnData",
    "agree_on_padding",
    "evaluation_batches",
    "evaluation_order",
    "load_model_for",
    "loss_sum",
    "named_as",
    "on_model",
    "task_for",
    "task_of_adapter",
    "task_of_model",
    "task_to_measure",
]
