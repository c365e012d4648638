"""The task is chosen by the data and the model; names in defaults equal those of the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import hub
from lorakit.choices import FORMATS, TASK_NAMES
from lorakit.config import LoraConfig
from lorakit.data import SHAPES, Completion, Document, Labeled, Records, Split, Tagged
from lorakit.errors import UsageError
from lorakit.tasks import TASKS, task_for, task_of_adapter, task_of_model


def test_names_in_defaults() -> None:
    assert tuple(TASKS) == TASK_NAMES
    assert set(FORMATS) == {name for task in TASKS.values() for name in task.formats}
    assert set(FORMATS) == {shape.name for shape in SHAPES if shape.build is not None}


def split(*records: Any) -> Split:
    return Split(Records(records), Records(), "")


CLASSES = (Labeled(("a",), "x"), Labeled(("b",), "y"))
PAIRS = (Labeled(("a", "b")), Labeled(("c", "d")))
SCORED = (Labeled(("a", "b"), 0.5), Labeled(("c", "d"), 0.1))
TAGS = (Tagged(("a", "b"), ("O", "X")),)


@pytest.mark.parametrize(
    ("records", "family", "expected"),
    [
        (CLASSES, "Bert", "classification"),
        (PAIRS, "Bert", "embedding"),
        (SCORED, "Bert", "classification"),
        (TAGS, "Bert", "token-classification"),
        ((Completion("a", "b"),), "T5", "seq2seq"),
        (CLASSES, "T5", "classification"),
    ],
)
def test_the_task_is_chosen_by_the_data_and_the_model(
    records: tuple[Any, ...], family: str, expected: str, model_directory: Callable[..., Path]
) -> None:
    source = hub.resolve(model_directory(family))
    found = task_for(None, split(*records), source)
    assert found.task.name == expected
    assert expected in found.note
    assert task_for(expected, split(*records), source).note == ""


def test_a_sentence_transformers_model_embeds_scored_pairs(model_directory: Callable[..., Path]) -> None:
    pytest.importorskip("sentence_transformers")
    folder = model_directory("Bert")
    types = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [{"name": path, "path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in types]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    found = task_for(None, split(*SCORED), hub.resolve(folder))
    assert (found.task.name, found.target.kind) == ("embedding", "score")
    (module,) = found.target.embedding["modules"]  # type: ignore[misc,union-attr]
    assert module["pooling_mode"] == "cls"  # type: ignore[index,call-overload]
    assert task_of_model(None, hub.resolve(folder)).task.name == "embedding"


def test_text_needs_a_causal_model(model_directory: Callable[..., Path], tiny_model_directory: Path) -> None:
    with pytest.raises(UsageError, match="does not continue text") as caught:
        task_for(None, split(Document("a")), hub.resolve(model_directory("Bert")))
    assert caught.value.field == "task"
    assert task_for(None, split(Document("a")), hub.resolve(tiny_model_directory)).task.generates
    assert task_of_model(None, hub.resolve(tiny_model_directory)).task.generates


def test_the_task_of_an_adapter() -> None:
    facts = {"task": "classification", "labels": {"kind": "class", "names": ["a", "b"]}}
    found = task_of_adapter(LoraConfig(task_type="SEQ_CLS"), facts)
    assert (found.task.name, found.target.names) == ("classification", ("a", "b"))
    assert task_of_adapter(LoraConfig(task_type="TOKEN_CLS"), None, 3).target.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert task_of_adapter(LoraConfig(task_type="SEQ_CLS"), None, 1).target.kind == "score"
    assert task_of_adapter(LoraConfig(), None).task.name == "causal-lm"
    with pytest.raises(UsageError, match="QUESTION_ANS"):
        task_of_adapter(LoraConfig(task_type="QUESTION_ANS"), None)
