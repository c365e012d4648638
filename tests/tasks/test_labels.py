"""Labels in data: what they are, the order of classes, and what is rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.data import Labeled, Records, Split, Tagged
from lorakit.errors import DataError
from lorakit.tasks import LabelOptions, Target
from lorakit.tasks.labels import class_target, ordered, pair_target, tag_target


def split(train: list[Any], held_out: list[Any] | None = None) -> Split:
    return Split(Records(train), Records(held_out or []), "")


def rows(*labels: Any) -> list[Labeled]:
    return [Labeled((f"text {at}",), label, "data.jsonl", at + 1) for at, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["pos", "neg", "pos"], "class", ("neg", "pos")),
        (["10", "9", "2"], "class", ("2", "9", "10")),
        ([1.0, 0.0], "class", ("0", "1")),
        ([0.5, 2.0], "score", ()),
        (["0.5", "2"], "score", ()),
        ([("a", "b"), ("b",), ()], "classes", ("a", "b")),
        ([("a",), "b"], "classes", ("a", "b")),
        ([("a",), ()], "classes", ("a",)),  # one class that applies, or does not
    ],
)
def test_what_labels_are(labels: list[Any], kind: str, names: tuple[str, ...]) -> None:
    found = class_target(split(rows(*labels)), LabelOptions())
    assert (found.kind, found.names) == (kind, names)


def test_the_type_of_labels_can_be_selected() -> None:
    assert class_target(split(rows("1", "2")), LabelOptions("score")).kind == "score"
    found = class_target(split(rows("a, b", "b")), LabelOptions("classes"))
    assert (found.kind, found.names) == ("classes", ("a", "b"))


@pytest.mark.parametrize(
    ("labels", "label_type", "message"),
    [
        (["a", None], "auto", "data.jsonl:2.*no label"),
        (["a", "a"], "auto", "same label, 'a'"),
        (["1", "x"], "score", "data.jsonl:2.*label 'x'.*finite number"),
        (
            [0.5, float(np.finfo(np.float32).max), float(np.finfo(np.float32).max) * 1.1],
            "auto",
            "data.jsonl:3.*float32",
        ),
        (["1", "-1e308"], "score", "data.jsonl:2.*label '-1e308'.*float32"),
        ([("a",), ("b",)], "class", "data.jsonl:1.*list of labels"),
        ([str(number) for number in range(1001)], "auto", "1,001 different values.*--label-type score"),
    ],
)
def test_labels_that_cannot_be_used(labels: list[Any], label_type: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_target(split(rows(*labels)), LabelOptions(label_type))


def test_new_labels_in_evaluation_data() -> None:
    parts = split(rows("a", "b"), rows("c"))
    assert class_target(parts, LabelOptions()).names == ("a", "b", "c")  # held out from the same data
    with pytest.raises(DataError, match=r"data.jsonl:1.*'c', which the training data lacks.*a, b") as caught:
        class_target(parts, LabelOptions(is_evaluation_given=True))
    assert caught.value.field == "eval_data"


def test_a_label_map_with_a_label_that_no_row_has_is_reported() -> None:
    options = LabelOptions(label_map={"Spam": "spam", "typo": "spam"})
    found = class_target(split(rows("Spam", "ham")), options)
    assert (found.names, "'typo'" in found.note, "'Spam'" in found.note) == (("ham", "spam"), True, False)
    words = [Tagged(("x", "y"), ("O", "Spam"), "data.jsonl", 1)]
    found = tag_target(split(words), options)
    assert (found.names, "'typo'" in found.note, "'Spam'" in found.note) == (("O", "spam"), True, False)


def test_the_classes_of_the_model_keep_their_order() -> None:
    assert ordered(["a", "b"], ["b", "a", "c"]) == ("b", "a", "c")
    assert ordered(["a", "x"], ["b", "a"]) == ("a", "x")
    unnamed = [f"LABEL_{number}" for number in range(12)]
    assert ordered(["LABEL_10", "LABEL_2"], unnamed) == tuple(unnamed)
    assert ordered(["10", "2"], unnamed) == tuple(map(str, range(12)))


def test_tags() -> None:
    one, other = Tagged(("a", "b"), ("O", "B-X")), Tagged(("c",), ("B-Y",), "t.jsonl", 7)
    assert tag_target(split([one], [other]), LabelOptions()).names == ("B-X", "B-Y", "O")
    with pytest.raises(DataError, match="'B-Y', which the training data lacks"):
        tag_target(split([one], [other]), LabelOptions(is_evaluation_given=True))
    with pytest.raises(DataError, match=r"t.jsonl:7.*no tags"):
        tag_target(split([Tagged(("c",), (), "t.jsonl", 7)]), LabelOptions())


def test_pairs() -> None:
    pair, scored = Labeled(("a", "b"), None, "p", 1), Labeled(("a", "b"), 0.5, "p", 2)
    assert pair_target(split([pair]), LabelOptions()) == Target("pairs")
    assert pair_target(split([scored]), LabelOptions()).kind == "score"
    with pytest.raises(DataError, match=r"p:2.*has a score, but other rows do not"):
        pair_target(split([pair, scored]), LabelOptions())
    with pytest.raises(DataError, match="single text"):
        pair_target(split([Labeled(("a",))]), LabelOptions())


@pytest.mark.parametrize(
    "target", [Target("class", ("a", "b")), Target("score"), Target("pairs", embedding={"prompt": "a"})]
)
def test_a_target_survives_json(target: Target, tmp_path: Path) -> None:
    assert Target.from_dict(target.as_dict()) == target
    assert Target.from_dict(None) is None
    assert Target.from_dict({"kind": "other", "names": []}) is None
