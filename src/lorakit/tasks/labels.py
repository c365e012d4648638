"""Read from the labels of data what a new model predicts: its classes, its tags, or scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from lorakit.choices import LabelType
from lorakit.data import Labeled, Record, Split
from lorakit.data.records import location
from lorakit.errors import DataError
from lorakit.tasks.target import (
    Kind,
    LabelOptions,
    Target,
    composed,
    labeled,
    names_of,
    number_of,
    ordered,
    other_classes,
    problem_of,
    renamed,
    scheme_for,
    score_of,
    spelled_once,
    unfit,
)

MOST_CLASSES = 1_000
"""Largest number of classes; more are usually texts or numbers in the wrong column."""


def no_target(parts: Split, options: LabelOptions) -> Target:
    """Return the target of a task without labels."""
    return Target()


def class_target(parts: Split, options: LabelOptions) -> Target:
    """Read the labels of rows, and return the classes, or the fact that labels are scores.

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
    classes = _renamed(seen.names[kind], options.label_map)
    if len(classes) > MOST_CLASSES:
        text = (
            f"The labels have at least {len(classes):,} different values, but at most {MOST_CLASSES:,} classes are "
            "supported. Check --columns label=COLUMN, or pass --label-type score if the labels are numbers."
        )
        raise DataError(text, what=len(classes), field="label_type")
    if options.is_evaluation_given:
        known = _renamed(trained[kind], options.label_map)
        _check_evaluation(parts.held_out, kind, known, options.label_map)
    if len(classes) < 2 and not (classes and seen.has_empty):  # several classes may apply: one that does, or does not
        text = (
            f"All rows have the same label{f', {next(iter(classes))!r}' if classes else ''}, so there is nothing to "
            "distinguish. Add rows with other labels."
        )
        raise DataError(text, what=next(iter(classes), None), field="data")
    names = ordered(classes, options.known)
    note = _note(seen.names[kind], names, options)
    return Target(kind, names, label_map=options.label_map, note=note)


def _renamed(names: Set[str], label_map: Mapping[str, str]) -> set[str]:
    return spelled_once(renamed(name, label_map) for name in names)


def _note(data_names: Set[str], names: Sequence[str], options: LabelOptions) -> str:
    """Return messages about a label map with labels that no row has, and about classes that replace the model's own."""
    seen = set(map(composed, data_names))
    unused = [repr(name) for name in options.label_map if name not in seen]
    notes = [f"No row has these labels of --label-map: {', '.join(unused[:10])}."] if unused else []
    return " ".join([*notes, *filter(None, [other_classes(names, options.known)])])


def tag_target(parts: Split, options: LabelOptions) -> Target:
    """Read the tags of words.

    Raises:
        DataError: A row has no tags, there is only one tag, or the evaluation data has a tag that the training data
            lacks.
    """
    trained = {tag for record in parts.training_records() for tag in names_of(record, "tags", {})}
    seen = trained.union(tag for record in parts.held_out for tag in names_of(record, "tags", {}))
    if options.is_evaluation_given:
        _check_evaluation(parts.held_out, "tags", _renamed(trained, options.label_map), options.label_map)
    tags = _renamed(seen, options.label_map)
    if len(tags) < 2:
        raise DataError("All words have the same tag, so there is nothing to distinguish.", field="data")
    names = ordered(tags, options.known)
    scheme, note = scheme_for(names, options.given_scheme)
    note = " ".join(filter(None, [note, _note(seen, names, options)]))
    return Target("tags", names, scheme=scheme, label_map=options.label_map, note=note)


def pair_target(parts: Split, options: LabelOptions) -> Target:
    """Read pairs of texts: with scores, or without, if the two texts of each row belong together.

    Raises:
        DataError: A row has a single text, or some rows have a score and others do not.
    """
    scored = unscored = 0
    for part in (parts.training_records(), parts.held_out):
        for record in part:
            if not isinstance(record, Labeled) or len(record.texts) < 2:
                raise unfit(record, "has a single text; embedding needs pairs of texts, such as 'anchor', 'positive'")
            if record.label is None:
                unscored += 1
            else:
                score_of(record)
                scored += 1
            if scored and unscored:
                raise unfit(
                    record,
                    "has no score, but other rows do" if record.label is None else "has a score, but other rows do not",
                )
    return Target("score" if scored else "pairs")


_LABEL_KINDS: tuple[Kind, ...] = ("class", "classes", "score")


class _Labels:
    """The labels of rows, which are read once; the rows are not kept.

    Attributes:
        names: Kind of the labels -> names of the classes if they are of this kind; none are added to too many.
        has_empty: Whether a row has an empty list of classes.
        problems: Kind of the labels -> error about the first row whose label is not of this kind.
    """

    def __init__(self) -> None:
        self.names: dict[Kind, set[str]] = {"class": set(), "classes": set()}
        self.problems: dict[Kind, DataError] = {}
        self.has_empty = False
        self._has_lists = self._has_fractions = False
        self._has_numbers_only = True

    def add(self, records: Iterable[Record]) -> None:
        """Add the labels of records; a DataError if one has no label because of its shape."""
        for record in records:
            row = labeled(record)
            number = number_of(row.label)
            self._has_lists |= isinstance(row.label, tuple)
            self.has_empty |= row.label == ()
            self._has_numbers_only &= number is not None
            self._has_fractions |= number is not None and not number.is_integer()
            for kind in _LABEL_KINDS:
                if kind not in self.problems and (problem := problem_of(row.label, kind)):
                    self.problems[kind] = unfit(row, problem)
            for kind, names in self.names.items():
                if len(names) <= MOST_CLASSES and not problem_of(row.label, kind):
                    names.update(names_of(row, kind, {}))

    def kind(self, label_type: LabelType) -> tuple[Kind, str]:
        """Return what the labels are, and a note if this was decided by their values."""
        if label_type != "auto":
            return label_type, ""
        if self._has_lists:
            return "classes", ""
        if self._has_numbers_only and self._has_fractions:
            return "score", "The labels are numbers with fractions, so the model predicts a number (see --label-type)."
        return "class", ""


def _check_evaluation(records: Iterable[Record], kind: Kind, known: Set[str], label_map: Mapping[str, str]) -> None:
    trained = set(map(composed, known))
    for record in records:
        new = [name for name in names_of(record, kind, label_map) if composed(name) not in trained]
        if new:
            noun, where = "tag" if kind == "tags" else "label", location(record)
            text = (
                f"{where}: the evaluation data has the {noun} {new[0]!r}, which the training data lacks; the training "
                f"data has {', '.join(sorted(known)[:10])}."
            )
            raise DataError(text, what=new[0], where=where, field="eval_data", allowed=sorted(known))
