"""Signatures: arguments that one library accepts by position or name, the other accepts too."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import lorakit.peft as ours
from lorakit.config.lora import NOT_IN_PEFT

from .rows import theirs

TASKS = [
    "CausalLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "FeatureExtraction",
]
ON_PEFT_MODEL = [
    *("from_pretrained", "save_pretrained", "load_adapter", "add_adapter", "set_adapter", "delete_adapter"),
    *("disable_adapter", "get_base_model", "print_trainable_parameters", "get_nb_trainable_parameters"),
]
ON_LORA_MODEL = [
    *("merge_and_unload", "unload", "merge_adapter", "unmerge_adapter", "set_adapter", "delete_adapter"),
    *("enable_adapter_layers", "disable_adapter_layers"),
]


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("task", TASKS)
def test_forward(task: str) -> None:
    first, second = (inspect.signature(getattr(lib, f"PeftModelFor{task}").forward) for lib in (theirs, ours))
    assert list(second.parameters) == list(first.parameters)
    assert [p.default for p in second.parameters.values()] == [p.default for p in first.parameters.values()]
    assert [p.kind for p in second.parameters.values()] == [p.kind for p in first.parameters.values()]


@pytest.mark.parametrize(
    ("owner", "method"),
    [*(("PeftModel", name) for name in ON_PEFT_MODEL), *(("LoraModel", name) for name in ON_LORA_MODEL)],
)
def test_methods(owner: str, method: str) -> None:
    """lorakit declares the arguments that it uses at the same positions; the others are passed by name."""
    expected, found = (_names(getattr(getattr(lib, owner), method)) for lib in (theirs, ours))
    ours_alone = {"state_dict"} if method == "save_pretrained" else set()  # trainers hand it over by name
    named = [name for name in found if name not in {"kwargs", *ours_alone}]
    assert named == [name for name in expected if name in named]
    assert named == expected[: len(named)] or method == "save_pretrained"
    assert set(named) == set(expected) or "kwargs" in found


def test_get_peft_model() -> None:
    assert _names(ours.get_peft_model)[:3] == _names(theirs.get_peft_model)[:3]


def test_config_has_the_same_fields_and_defaults() -> None:
    left_out = {"runtime_config", *NOT_IN_PEFT}  # the first is never written to a file
    first, second = (
        {f.name: f for f in dataclasses.fields(lib.LoraConfig) if f.name not in left_out} for lib in (theirs, ours)
    )
    assert set(second) == set(first)
    one, other = theirs.LoraConfig(), ours.LoraConfig()
    different = {name for name in first if _plain(getattr(one, name)) != _plain(getattr(other, name))}
    assert different == {"peft_version"}


def test_task_types() -> None:
    assert [task.value for task in ours.TaskType] == [task.value for task in theirs.TaskType]
    assert all(str(ours.TaskType(task.value)) == str(task) for task in theirs.TaskType)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
