"""What a model predicts: classes, scores or tags, as found in the labels of the data.

The names of the classes are written to the adapter's `lorakit.json` and to the config of a merged model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from lorakit.data import Labeled, Record, Split, Tagged
from lorakit.data.records import location
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import DataError

LabelType = Literal["auto", "class", "classes", "score"]
"""Values of the setting `label_type`: one class per row, any number of classes per row, or a number."""

Label: TypeAlias = str | tuple[str, ...] | float | None
"""The label of a record; see `Labeled.label`."""

Kind = Literal["none", "class", "classes", "score", "tags", "pairs"]
"""What is predicted for a row: text or nothing, one class, several classes, a number, a tag per word, or which of two
texts belong together."""

KIND_BY_PROBLEM: Mapping[str, Kind] = {
    "single_label_classification": "class",
    "multi_label_classification": "classes",
    "regression": "score",
}
"""`problem_type` in the config of a transformers model -> what it predicts."""

MOST_CLASSES = 1_000
"""Largest number of classes; more are usually texts or numbers in the wrong column."""


@dataclass(frozen=True)
class Target:
    """What a model predicts.

    Attributes:
        kind: What is predicted for a row.
        names: Names of the classes or tags, in the order of the model's outputs.
        pooling: How a text's embedding is computed from those of its tokens: "mean" or "cls" (the first token).
        note: Message about how the labels were read, or "".
    """

    kind: Kind = "none"
    names: tuple[str, ...] = ()
    pooling: str = "mean"
    note: str = field(default="", compare=False)

    def ids(self) -> dict[str, int]:
        """Return a dict from the name of each class to its index."""
        return {name: number for number, name in enumerate(self.names)}

    def config_values(self) -> JsonObject:
        """Return the config values that give a transformers model the right head; empty if it needs none."""
        if self.kind in ("none", "pairs"):
            return {}
        names: Sequence[str] = self.names or ("score",)
        values: JsonObject = {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
        problems = [name for name, kind in KIND_BY_PROBLEM.items() if kind == self.kind]
        if problems:
            values["problem_type"] = problems[0]
        return values

    def as_dict(self) -> JsonObject:
        """Return the target as plain JSON values, for `lorakit.json`."""
        pooling = {} if self.pooling == "mean" else {"pooling": self.pooling}
        return {"kind": self.kind, "names": list(self.names), **pooling}

    @classmethod
    def from_dict(cls, values: JsonValue) -> Target | None:
        """Return the target that `as_dict` described, or None if the values are of another form."""
        if not isinstance(values, dict):
            return None
        kind, names = values.get("kind"), values.get("names")
        known = next((one for one in get_args(Kind) if one == kind), None)
        if known is None or not isinstance(names, list):
            return None
        return cls(known, tuple(str(name) for name in names), "cls" if values.get("pooling") == "cls" else "mean")


@dataclass(frozen=True)
class LabelOptions:
    """Choices about how labels are read.

    Attributes:
        label_type: What a label is; "auto" decides by the values.
        is_evaluation_given: Whether the user passed evaluation data, which may then not contain new labels.
        known: Names of the classes of the model's own head, in order; empty if it has none.
        pooling: How the model computes the embedding of a text; see `Target.pooling`.
    """

    label_type: LabelType = "auto"
    is_evaluation_given: bool = False
    known: tuple[str, ...] = ()
    pooling: str = "mean"


def no_target(parts: Split, options: LabelOptions) -> Target:
    """Return the target of a task without labels."""
    return Target()


def class_target(parts: Split, options: LabelOptions) -> Target:
    """Read the labels of rows, and return the classes, or the fact that labels are scores.

    Args:
        parts: Training and evaluation records.
        options: How labels are read.

    Raises:
        DataError: A row has no label or a label of another type, there is only one class, or the evaluation data has a
            class that the training data lacks.
    """
    seen = _Labels()
    seen.add(parts.training_records())
    trained = {kind: set(names) for kind, names in seen.names.items()}
    seen.add(parts.held_out)
    kind, note = seen.kind(options.label_type)
    if kind in seen.problems:
        raise seen.problems[kind]
    if kind == "score":
        return Target(kind, note=note)
    found = seen.names[kind]
    if len(found) > MOST_CLASSES:
        raise DataError(
            f"The labels have at least {len(found):,} different values, but at most {MOST_CLASSES:,} classes are "
            "supported. Check --columns label=COLUMN, or pass --label-type score if the labels are numbers.",
            what=len(found),
            field="label_type",
        )
    if options.is_evaluation_given:
        _check_evaluation(parts.held_out, kind, trained[kind])
    if len(found) < 2:
        raise DataError(
            f"All rows have the same label{f', {next(iter(found))!r}' if found else ''}, so there is nothing to "
            "distinguish. Add rows with other labels.",
            what=next(iter(found), None),
            field="data",
        )
    return Target(kind, ordered(found, options.known), note=note)


def tag_target(parts: Split, options: LabelOptions) -> Target:
    """Read the tags of words.

    Args:
        parts: Training and evaluation records.
        options: How labels are read.

    Raises:
        DataError: A row has no tags, there is only one tag, or the evaluation data has a tag that the training data
            lacks.
    """
    trained = {tag for record in parts.training_records() for tag in _tags(record)}
    held_out = dict.fromkeys(tag for record in parts.held_out for tag in _tags(record))
    new = [tag for tag in held_out if tag not in trained]
    if new and options.is_evaluation_given:
        raise _new_labels("tag", new, trained)
    found = {*trained, *held_out}
    if len(found) < 2:
        raise DataError("All words have the same tag, so there is nothing to distinguish.", field="data")
    names = ordered(found, options.known)
    return Target("tags", names)


def pair_target(parts: Split, options: LabelOptions) -> Target:
    """Read pairs of texts: with scores, or without, if the two texts of each row belong together.

    Args:
        parts: Training and evaluation records.
        options: How labels are read.

    Raises:
        DataError: A row has a single text, or some rows have a score and others do not.
    """
    scored = unscored = 0
    for part in (parts.training_records(), parts.held_out):
        for record in part:
            if not isinstance(record, Labeled) or len(record.texts) < 2:
                raise _unfit(record, "has a single text; embedding needs pairs of texts, such as 'anchor', 'positive'")
            if record.label is None:
                unscored += 1
            else:
                score_of(record)
                scored += 1
            if scored and unscored:
                raise _unfit(
                    record,
                    "has no score, but other rows do" if record.label is None else "has a score, but other rows do not",
                )
    return Target("score" if scored else "pairs", pooling=options.pooling)


def ordered(found: Iterable[str], known: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of classes in the order of the model's outputs.

    Args:
        found: The names in the data.
        known: Names of the model's own classes; used if they include all names in the data.

    Returns:
        The model's own classes if they fit; else the names in numerical order if all are integers, or in alphabetical
        order.
    """
    names = set(found)
    if names <= set(known):
        return tuple(known)
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def names_of(record: Record, kind: Kind) -> tuple[str, ...]:
    """Return the names of the classes of a row whose label is one class or several.

    Raises:
        DataError: The row has another type of label.
    """
    label = _labeled(record).label
    if isinstance(label, tuple):
        return label
    if isinstance(label, float):
        return (f"{label:g}",)
    if label is None:
        raise _unfit(record, "has no label")
    if kind == "classes":
        return tuple(part.strip() for part in label.split(",") if part.strip())
    return (label,)


def score_of(record: Record) -> float:
    """Return the score of a row.

    Raises:
        DataError: The label is not a finite number.
    """
    label = _labeled(record).label
    number = _number(label)
    if number is None:
        raise _unfit(record, _not_a_score(label))
    return number


def _number(label: Label) -> float | None:
    try:
        number = math.nan if label is None or isinstance(label, tuple) else float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _not_a_score(label: Label) -> str:
    return f"has the label {label!r}; a score must be a finite number"


class _Labels:
    """The labels of rows, which are read once; the rows are not kept.

    Attributes:
        names: Kind of the labels -> names of the classes if they are of this kind; none are added to too many.
        problems: Kind of the labels -> error about the first row whose label is not of this kind.
    """

    def __init__(self) -> None:
        self.names: dict[Kind, set[str]] = {"class": set(), "classes": set()}
        self.problems: dict[Kind, DataError] = {}
        self._has_lists = self._has_fractions = False
        self._has_numbers_only = True

    def add(self, records: Iterable[Record]) -> None:
        """Add the labels of records.

        Raises:
            DataError: A record has no label because of its shape.
        """
        for record in records:
            row = _labeled(record)
            number = _number(row.label)
            self._has_lists |= isinstance(row.label, tuple)
            self._has_numbers_only &= number is not None
            self._has_fractions |= number is not None and not number.is_integer()
            for kind in _LABEL_KINDS:
                if kind not in self.problems and (problem := _problem(row.label, kind)):
                    self.problems[kind] = _unfit(row, problem)
            for kind, names in self.names.items():
                if row.label is not None and len(names) <= MOST_CLASSES:
                    names.update(names_of(row, kind))

    def kind(self, label_type: LabelType) -> tuple[Kind, str]:
        """Return what the labels are, and a note if this was decided by their values."""
        if label_type != "auto":
            return label_type, ""
        if self._has_lists:
            return "classes", ""
        if self._has_numbers_only and self._has_fractions:
            return "score", "The labels are numbers with fractions, so the model predicts a number (see --label-type)."
        return "class", ""


_LABEL_KINDS: tuple[Kind, ...] = ("class", "classes", "score")


def _problem(label: Label, kind: Kind) -> str:
    """Return why a label is not of a kind, or ""."""
    if label is None:
        return "has no label"
    if kind == "score":
        return _not_a_score(label) if _number(label) is None else ""
    if kind == "class" and isinstance(label, tuple):
        return "has a list of labels; pass --label-type classes if several classes may apply"
    if kind == "classes" and isinstance(label, float):
        return f"has the label {label:g}; it must be a list of class names"
    return ""


def _check_evaluation(records: Iterable[Record], kind: Kind, trained: Set[str]) -> None:
    for record in records:
        new = [name for name in names_of(record, kind) if name not in trained]
        if new:
            raise _new_labels("label", new, trained, location(record))


def _new_labels(noun: str, new: Sequence[str], known: Set[str], where: str = "") -> DataError:
    at = f"{where}: " if where else ""
    return DataError(
        f"{at}the evaluation data has the {noun} {new[0]!r}, which the training data lacks; the training data has "
        f"{', '.join(sorted(known)[:10])}.",
        what=new[0],
        where=where or None,
        field="eval_data",
        allowed=sorted(known),
    )


def _labeled(record: Record) -> Labeled:
    if not isinstance(record, Labeled):
        raise _unfit(
            record, "has no label; use rows with 'text' and 'label', or select them with --format and --columns"
        )
    return record


def _tags(record: Record) -> tuple[str, ...]:
    if not isinstance(record, Tagged):
        raise _unfit(record, "has no tags; use rows with 'tokens' and 'tags'")
    if record.words and not record.tags:
        raise _unfit(record, "has no tags")
    return record.tags


def _unfit(record: Record, problem: str) -> DataError:
    return DataError(f"{location(record)}: the row {problem}.", where=location(record), field="data")
