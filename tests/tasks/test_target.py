"""One mapping from labels to outputs: its order, the names that it lacks, renamed labels, and the model's own head."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit import hub
from lorakit.config import LoraConfig
from lorakit.data import Labeled, Records, Split, Tagged
from lorakit.errors import ConfigError, DataError, ModelError, UsageError
from lorakit.tasks import LabelOptions, Target, TaskOnData, named_as, task_for, task_of_adapter, task_to_measure
from lorakit.tasks.labels import class_target, tag_target
from lorakit.tasks.target import ordered

SPAM = Target("class", ("spam", "ham"))


def split(*records: Any) -> Split:
    return Split(Records(records), Records(), "")


def rows(*labels: Any) -> list[Labeled]:
    return [Labeled((f"text {at}",), label, "data.jsonl", at + 1) for at, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["1", "01", "001", "0"], ("0", "001", "01", "1")),
        (["-1", "1", "0", "-10"], ("-10", "-1", "0", "1")),
        (["b", "10", "a", "9", "1.5"], ("1.5", "9", "10", "a", "b")),
        (["1", "١", "²"], ("1", "²", "١")),
        ([str(2**70), str(2**70 - 1)], (str(2**70 - 1), str(2**70))),
    ],
)
def test_the_order_does_not_depend_on_the_order_of_the_names(names: list[str], expected: tuple[str, ...]) -> None:
    for order in itertools.permutations(names):
        assert ordered(order) == expected


@given(
    st.sets(st.one_of(st.integers(-30, 30).map(str), st.text(min_size=1), st.sampled_from(["01", "1.0"])), min_size=2)
)
def test_numbers_come_first_by_value_and_any_order_of_rows_gives_the_same(names: set[str]) -> None:
    found = ordered(names)
    assert set(found) == names and len(found) == len(names)
    numbers = [name for name in found if name.lstrip("-").isascii() and name.lstrip("-").isdecimal()]
    assert [int(name) for name in numbers] == sorted(int(name) for name in numbers)
    shuffled = list(names)
    random.Random(3).shuffle(shuffled)
    assert class_target(split(*rows(*shuffled)), LabelOptions("class")).names == found
    tags = [Tagged((name,), (name,)) for name in shuffled]
    assert tag_target(split(*tags), LabelOptions()).names == found


@pytest.mark.parametrize(
    ("label", "close"),
    [
        ("Spam", "spam"),
        ("SPAM ", "spam"),
        ("spma", "spam"),
        ("Ham", "ham"),
        ("h-a-m", "ham"),
        ("zzz", None),
        ("0", None),
    ],
)
def test_a_name_that_the_model_lacks_is_an_error(label: str, close: str | None) -> None:
    with pytest.raises(DataError) as caught:
        SPAM.check(rows("spam", label))
    error = caught.value
    assert (error.what, error.where, error.field) == (label, "data.jsonl:2", "label_map")
    assert error.allowed == ("spam", "ham")
    assert (f"={close}" if close else "=NAME") in str(error)
    if close:
        assert f"the model has `{close}`" in str(error)
        found = SPAM.with_options(LabelOptions(label_map={label: close}))
        assert found.ids_of(rows(label)[0]) == [SPAM.names.index(close)]


def test_a_label_map_is_saved_and_extended() -> None:
    first = class_target(split(*rows("Spam", "ham", "spam")), LabelOptions(label_map={"Spam": "spam"}))
    assert first.names == ("ham", "spam")
    again = Target.from_dict(json.loads(json.dumps(first.as_dict())))
    assert again is not None
    assert again.ids_of(rows("Spam")[0]) == [1]
    more = again.with_options(LabelOptions(label_map={"0": "ham"}))
    assert [more.ids_of(row) for row in rows("Spam", "0")] == [[1], [0]]
    with pytest.raises(ConfigError) as caught:
        again.with_options(LabelOptions(label_map={"0": "hma"}))
    assert (caught.value.what, caught.value.field) == ("hma", "label_map")


def test_labels_of_another_type_are_not_dropped() -> None:
    for target, label in [(SPAM, ("spam", "ham")), (SPAM, None), (Target("score"), "x"), (Target("score"), None)]:
        with pytest.raises(DataError) as caught:
            target.check(rows(label))
        assert caught.value.where == "data.jsonl:1"
    assert Target("classes", ("a", "b")).ids_of(rows("b, a, b")[0]) == [0, 1]
    large = class_target(split(*rows(12345678.0, 12345679.0)), LabelOptions("class"))
    assert large.names == ("12345678", "12345679")


def test_classes_without_names_are_their_numbers() -> None:
    target = Target("class", ("LABEL_0", "LABEL_1"))
    assert [target.ids_of(row) for row in rows("LABEL_1", "0", "1")] == [[1], [0], [1]]
    with pytest.raises(DataError):
        target.ids_of(rows("2")[0])


@pytest.fixture
def classifier(model_directory: Callable[..., Path]) -> Callable[..., hub.ModelSource]:
    """A model whose config says that it has its own head, with the given names."""

    def make(names: list[str], kind: str = "SequenceClassification", **values: Any) -> hub.ModelSource:
        folder = model_directory("Bert")
        config = json.loads((folder / "config.json").read_text())
        named = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
        (folder / "config.json").write_text(
            json.dumps({**config, **named, "architectures": [f"BertFor{kind}"], **values})
        )
        return hub.resolve(folder)

    return make


def test_a_finished_classifier_is_measured_by_its_own_head(classifier: Callable[..., hub.ModelSource]) -> None:
    source = classifier(["spam", "ham"])
    found = task_to_measure(Records(rows("ham", "ham")), source, LabelOptions())  # one class is enough to measure
    assert (found.task.name, found.target.names) == ("classification", ("spam", "ham"))
    with pytest.raises(DataError) as caught:
        task_to_measure(Records(rows("Spam", "Ham")), source, LabelOptions())
    assert (caught.value.what, caught.value.field) == ("Spam", "label_map")
    renamed = LabelOptions(label_map={"Spam": "spam", "Ham": "ham"})
    found = task_to_measure(Records(rows("Spam", "Ham")), source, renamed)
    assert [found.target.ids_of(row) for row in rows("Spam", "Ham")] == [[0], [1]]
    numbered = task_to_measure(Records(rows("1", "0")), classifier(["LABEL_0", "LABEL_1"]), LabelOptions())
    assert [numbered.target.ids_of(row) for row in rows("1", "0")] == [[1], [0]]
    tagged = task_to_measure(
        Records([Tagged(("a",), ("O",))]), classifier(["O", "B-X"], "TokenClassification"), LabelOptions()
    )
    assert (tagged.target.names, tagged.target.scheme) == (("O", "B-X"), "BIO")
    with pytest.raises(ModelError) as wrong:
        task_to_measure(Records(rows("a")), classifier(["a", "a"]), LabelOptions())
    assert wrong.value.field == "id2label"
    for ids in ({"1": "spam", "2": "ham"}, {"0": "spam", "2": "ham"}):  # no output has these positions
        with pytest.raises(ModelError) as wrong:
            task_to_measure(Records(rows("ham")), classifier(["spam", "ham"], id2label=ids), LabelOptions())
        assert (wrong.value.field, wrong.value.what) == ("id2label", min(ids))


def test_training_does_not_permute_a_finished_head(classifier: Callable[..., hub.ModelSource]) -> None:
    source = classifier(["spam", "ham"])
    assert task_for(None, split(*rows("ham", "spam")), source).target.names == ("spam", "ham")
    with pytest.raises(DataError) as caught:
        task_for(None, split(*rows("Ham", "Spam")), source)
    assert caught.value.field == "label_map"
    other = task_for(None, split(*rows("news", "mail")), source).target
    assert other.names == ("mail", "news")
    assert "spam, ham" in other.note


def test_an_adapter_without_names_has_those_of_its_base(classifier: Callable[..., hub.ModelSource]) -> None:
    facts = hub.ModelFacts.of(classifier(["spam", "ham"]))
    for outputs in (2, None):
        found = named_as(task_of_adapter(LoraConfig(task_type="SEQ_CLS"), None, outputs), facts)
        assert found.target.names == ("spam", "ham")
    other = named_as(task_of_adapter(LoraConfig(task_type="SEQ_CLS"), None, 3), facts)
    assert other.target.has_default_names


def test_saved_labels_decide(model_directory: Callable[..., Path]) -> None:
    source = hub.resolve(model_directory("Bert"))
    saved = TaskOnData(task_for("classification", split(*rows("a", "b")), source).task, SPAM)
    assert task_for(None, split(*rows("ham", "spam")), source, LabelOptions(), saved).target.names == ("spam", "ham")
    for labels in (["Ham", "spam"], ["a", "b"], [("ham", "spam")], [None]):
        with pytest.raises(DataError):
            task_for(None, split(*rows(*labels)), source, LabelOptions(), saved)


def test_options_that_do_not_apply(model_directory: Callable[..., Path]) -> None:
    source = hub.resolve(model_directory("Bert"))
    scores, classes = split(*rows(0.5, 0.25)), split(*rows("a", "b"))
    for parts, options, field in [
        (scores, LabelOptions(label_map={"a": "b"}), "label_map"),
        (classes, LabelOptions(tag_scheme="BIO"), "tag_scheme"),
    ]:
        with pytest.raises(UsageError) as caught:
            task_for("classification", parts, source, options)
        assert caught.value.field == field
    with pytest.raises(UsageError):
        Target("score").with_options(LabelOptions(label_map={"a": "b"}))
    with pytest.raises(UsageError):
        SPAM.with_options(LabelOptions(tag_scheme="BIO"))
    unmarked = Target("tags", ("NOUN", "VERB"))
    assert "no known scheme" in unmarked.with_options(LabelOptions()).note
    assert unmarked.with_options(LabelOptions(tag_scheme="none")).note == ""


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("kind", ["class", "classes", "tags"])
@pytest.mark.parametrize("own", [NFC, NFD])
@pytest.mark.parametrize("given", [NFC, NFD])
def test_a_name_is_found_however_its_characters_are_encoded(given: str, own: str, kind: Any) -> None:
    target = Target(kind, ("O", own), scheme="none" if kind == "tags" else "")
    row = (
        Tagged(("a", "b"), (given, "O"))
        if kind == "tags"
        else Labeled(("a",), (given,) if kind == "classes" else given)
    )
    assert target.ids_of(row) == ([1, 0] if kind == "tags" else [1])
    renamed = target.with_options(LabelOptions(label_map={given.title(): given}))
    other = Tagged(("a",), (own.title(),)) if kind == "tags" else Labeled(("a",), own.title())
    assert renamed.ids_of(other) == [1]


def test_classes_that_a_model_distinguishes_stay_apart() -> None:
    """Earlier versions trained them; unicodedata tells which names are the same."""
    target = Target("class", (NFC, NFD))
    assert [target.ids_of(Labeled(("a",), name)) for name in (NFC, NFD)] == [[0], [1]]


@pytest.mark.parametrize("is_tagged", [False, True])
@given(names=st.lists(st.text("ae\u00e9\u0301\u1100\u1161\uac00\u212b\u00c5", min_size=1, max_size=3), min_size=2))
def test_names_of_the_same_characters_are_one_class(names: list[str], is_tagged: bool) -> None:
    forms = {unicodedata.normalize("NFC", name) for name in names}
    if len(forms) < 2:
        return
    make = tag_target if is_tagged else class_target
    records = [Tagged(("a",), (name,)) for name in names] if is_tagged else rows(*names)
    options = LabelOptions(tag_scheme="none") if is_tagged else LabelOptions()
    target = make(Split(Records(records), Records(records), ""), options)
    assert {unicodedata.normalize("NFC", name) for name in target.names} == forms and len(target.names) == len(forms)
    for one, two in itertools.product(records, repeat=2):
        same = unicodedata.normalize("NFC", names[records.index(one)]) == unicodedata.normalize(
            "NFC", names[records.index(two)]
        )
        assert (target.ids_of(one) == target.ids_of(two)) == same
    if len(set(names)) == len(forms):
        assert set(target.names) == set(names)  # as the data spells them
    shuffled = make(split(*reversed(records)), options)
    assert shuffled.names == target.names
    known = tuple(unicodedata.normalize("NFD", name) for name in target.names)
    assert make(split(*records), replace(options, known=known)).names == known
