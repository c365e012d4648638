"""What a model predicts: classes, scores or tags, and the only mapping from the labels of data to its outputs.

The names of the classes are written to the adapter's `lorakit.json` and to the config of a merged model. Data that is
read later has the same names, or names that a label map translates; no other name gets an output.
"""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

from lorakit.choices import LabelType
from lorakit.data import Labeled, Record, Tagged
from lorakit.data.records import location
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import ConfigError, DataError, UsageError, nearest
from lorakit.tasks.metrics import SCHEMES, UNMARKED, check_scheme, scheme_of

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


@dataclass(frozen=True)
class Target:
    """What a model predicts.

    Attributes:
        names: Names of the classes or tags, in the order of the model's outputs.
        embedding: How the model embeds texts, as plain JSON values; empty if it is not known or the task does not.
        embedder: What computes embeddings from hidden states, or None; see `lorakit.tasks.embedding.on_model`.
        scheme: The scheme of the tags, a key of `lorakit.tasks.metrics.SCHEMES`; recognized by the tags if it is "".
        label_map: Name of a label in the data -> its name in `names`, for labels that the data calls by another name.
        note: Message about how the labels were read, or "".
    """

    kind: Kind = "none"
    names: tuple[str, ...] = ()
    embedding: JsonObject = field(default_factory=dict)
    embedder: Any = field(default=None, compare=False, repr=False)
    scheme: str = ""
    label_map: Mapping[str, str] = field(default_factory=dict, compare=False)
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.kind == "tags" and not self.scheme:
            object.__setattr__(self, "scheme", scheme_of(self.names)[0])

    @property
    def has_default_names(self) -> bool:
        """Return whether the classes have only the numbered names that transformers gives to classes without names."""
        return bool(self.names) and self.names == default_names(len(self.names))

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Name of each class, also composed, -> its index; also its number, if the classes have only numbered names."""
        numbers = {str(number): number for number in range(len(self.names))} if self.has_default_names else {}
        names = {name: number for number, name in enumerate(self.names)}
        return {**numbers, **{composed(name): number for name, number in names.items()}, **names}

    def ids_of(self, record: Record) -> list[int]:
        """Return the classes of a row, in ascending order, or the tag of each of its words, as indices into `names`.

        Raises:
            DataError: The row has no label, a label of another type, or a name that the model lacks.
        """
        found = names_of(record, self.kind, self.label_map)
        ids = [self.id_of(name) for name in found]
        if None in ids:
            raise _unknown(found[ids.index(None)], self.names, location(record))
        known = [number for number in ids if number is not None]
        return known if self.kind == "tags" else sorted(set(known))

    def id_of(self, name: str) -> int | None:
        """Return the index of a class, or None if the model lacks it; equal characters may have other code points."""
        return self.ids.get(name, self.ids.get(composed(name)))

    def with_options(self, options: LabelOptions) -> Target:
        """Return this target for other data, whose label map is added to this one.

        Raises:
            ConfigError: The label map leads to a name that the model lacks, or the tags do not follow the given scheme.
        """
        options.check_kind(self.kind)
        for name in options.label_map.values():
            if self.id_of(name) is None:
                raise ConfigError.of("label_map", name, allowed=self.names)
        scheme, note = self.scheme, self.note
        if self.kind == "tags":
            scheme, note = scheme_for(self.names, options.given_scheme or scheme)
            note = scheme_of(self.names)[1] if scheme == UNMARKED and options.given_scheme is None else note
        return replace(self, scheme=scheme, label_map={**self.label_map, **options.label_map}, note=note)

    def check(self, records: Iterable[Record]) -> None:
        """Raise the DataError of `ids_of` for the first row whose labels are not among those of the model."""
        for record in records:
            if self.kind == "score":
                score_of(record)
            else:
                self.ids_of(record)

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
        values: JsonObject = {"kind": self.kind, "names": list(self.names)}
        if self.embedding:
            values["embedding"] = self.embedding
        if self.scheme:
            values["scheme"] = self.scheme
        if self.label_map:
            values["label_map"] = dict(self.label_map)
        return values

    @classmethod
    def from_dict(cls, values: JsonValue) -> Target | None:
        """Return the target that `as_dict` described, or None if the values are of another form."""
        if not isinstance(values, dict):
            return None
        kind, names = values.get("kind"), values.get("names")
        known = next((one for one in get_args(Kind) if one == kind), None)
        if known is None or not isinstance(names, list):
            return None
        embedding, scheme, renamed = values.get("embedding"), values.get("scheme"), values.get("label_map")
        return cls(
            known,
            tuple(map(str, names)),
            embedding if isinstance(embedding, dict) else {},
            scheme=str(scheme) if isinstance(scheme, str) and scheme in SCHEMES else "",
            label_map={str(key): str(name) for key, name in renamed.items()} if isinstance(renamed, dict) else {},
        )


@dataclass(frozen=True)
class LabelOptions:
    """Choices about how labels are read.

    Attributes:
        label_type: What a label is; "auto" decides by the values.
        is_evaluation_given: Whether the user passed evaluation data, which may then not contain new labels.
        known: Names of the classes of the model's own head, in order; empty if it has none.
        label_map: Name of a label in the data, which becomes composed, -> its name in the model.
    """

    label_type: LabelType = "auto"
    is_evaluation_given: bool = False
    known: tuple[str, ...] = ()
    label_map: Mapping[str, str] = field(default_factory=dict)
    tag_scheme: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_map", {composed(name): known for name, known in self.label_map.items()})

    @property
    def given_scheme(self) -> str | None:
        """The given scheme of the tags, or None if it is to be recognized."""
        return None if self.tag_scheme == "auto" else self.tag_scheme

    def check_kind(self, kind: Kind) -> None:
        """Raise a UsageError if the label map or the tag scheme was given, but does not apply to what is predicted."""
        if self.label_map and kind not in ("class", "classes", "tags"):
            text = "label_map renames classes and tags, but this task or data has none; omit it."
            raise UsageError(text, what=dict(self.label_map), field="label_map")
        if self.given_scheme is not None and kind != "tags":
            text = "tag_scheme does not apply, because no tags are predicted; omit it."
            raise UsageError(text, what=self.tag_scheme, field="tag_scheme")


def composed(name: str) -> str:
    """Return the composed form (NFC) of a name, which is the same for all spellings of the same characters."""
    return unicodedata.normalize("NFC", name)


def spelled_once(names: Iterable[str]) -> set[str]:
    """Return names as they are, except that different spellings of the same characters become one, the composed one."""
    distinct = set(names)
    count = Counter(map(composed, distinct))
    return {name if count[composed(name)] == 1 else composed(name) for name in distinct}


def default_names(count: int) -> tuple[str, ...]:
    """Return the names that transformers gives to classes without names."""
    return tuple(f"LABEL_{number}" for number in range(count))


def scheme_for(names: Sequence[str], chosen: str | None) -> tuple[str, str]:
    """Return the scheme of tags, and a message if it is not known."""
    if chosen is None:
        return scheme_of(names)
    check_scheme(chosen, names)
    return chosen, ""


def ordered(found: Iterable[str], known: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of classes in the order of the model's outputs, which depends only on the set of names.

    They are the model's own classes (`known`) if they include all names in the data (also by number if they have no
    names); else numbers by value, then other names by their characters. Names with the same value, such as "1" and
    "01", are ordered by their characters.

    Raises:
        DataError: The names differ from the model's only in spelling, so a new order would permute its outputs.
    """
    names = set(found)
    for own in _own_names(known):
        if set(map(composed, names)) <= set(map(composed, own)):
            return own
    if {_spelling(name) for name in names} <= {_spelling(name) for name in known}:
        raise _unknown(min(names.difference(known), key=_place), known)
    return tuple(sorted(names, key=_place))


def _own_names(known: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the names under which data may have all classes of the model's own head."""
    is_numbered = tuple(known) == default_names(len(known))
    return [tuple(known), *([tuple(map(str, range(len(known))))] if is_numbered else [])]


_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)


def _place(name: str) -> tuple[bool, Decimal, str]:
    number = Decimal(name) if _NUMBER.fullmatch(name) else None
    return number is None, number or Decimal(0), name


def other_classes(names: Sequence[str], known: Sequence[str]) -> str:
    """Return a message if the classes of the data replace those of the model's own head, or ""."""
    if not known or tuple(names) in _own_names(known):
        return ""
    return (
        f"The model's head has the classes {', '.join(known[:10])}, but the data has others ({', '.join(names[:10])}), "
        "so the head is trained for new classes."
    )


def _spelling(name: str) -> str:
    """Return a name without case, spaces, hyphens and underscores; a number as it is."""
    return name if _NUMBER.fullmatch(name) else re.sub(r"[\s_-]+", "", composed(name).casefold()) or name


def _unknown(name: str, known: Sequence[str], where: str = "") -> DataError:
    """Return the error about a label that the model lacks, with the most similar name that it has."""
    spelled = {_spelling(one): one for one in reversed(known)}
    close = [spelled[found] for found in nearest(_spelling(name), list(spelled), 1)]
    has = f"`{close[0]}`" if close else f"{', '.join(known[:10])}{' ...' if len(known) > 10 else ''}"
    flag = shlex.quote(f"{name}={close[0] if close else 'NAME'}")
    text = f"{where}{': ' if where else ''}`{name}`: the model has {has}; use `--label-map {flag}`."
    return DataError(text, what=name, where=where or None, field="label_map", allowed=tuple(known))


def names_of(record: Record, kind: Kind, label_map: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of a row's class or classes, or the tags of its words, translated by the label map.

    Raises:
        DataError: The row has another type of label.
    """
    if kind == "tags":
        found = _tags(record)
    else:
        label = labeled(record).label
        if problem := problem_of(label, kind):
            raise unfit(record, problem)
        found = _class_names(label, kind)
    return tuple(renamed(name, label_map) for name in found)


def renamed(name: str, label_map: Mapping[str, str]) -> str:
    """Return the name in the model of a label in the data; see `LabelOptions.label_map`."""
    return label_map.get(name, label_map.get(composed(name), name))


def _class_names(label: Label, kind: Kind) -> tuple[str, ...]:
    if isinstance(label, tuple):
        return label
    if isinstance(label, float):
        return (str(int(label)) if label.is_integer() else repr(label),)
    if label is None:
        return ()
    return tuple(part.strip() for part in label.split(",") if part.strip()) if kind == "classes" else (label,)


LARGEST_SCORE = (2 - 2**-23) * 2.0**127
"""Largest number in float32, in which losses and metrics compare scores."""


def score_of(record: Record) -> float:
    """Return the score of a row; a DataError if the label is not a number that float32 can hold."""
    label = labeled(record).label
    number = number_of(label)
    if number is None or abs(number) > LARGEST_SCORE:
        raise unfit(record, problem_of(label, "score"))
    return number


def number_of(label: Label) -> float | None:
    """Return the finite number that a label is, or None."""
    try:
        number = math.nan if label is None or isinstance(label, tuple) else float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def problem_of(label: Label, kind: Kind) -> str:
    """Return why a label is not of a kind, or ""."""
    if label is None:
        return "has no label"
    if kind == "score":
        number, limit = number_of(label), f"a finite number of at most {LARGEST_SCORE:.3g} (float32)"
        is_score = number is not None and abs(number) <= LARGEST_SCORE
        return "" if is_score else f"has the label {label!r}; a score must be {limit}"
    if kind == "class" and isinstance(label, tuple):
        return "has a list of labels; pass --label-type classes if several classes may apply"
    if kind == "classes" and isinstance(label, float):
        return f"has the label {label:g}; it must be a list of class names"
    return ""


def labeled(record: Record) -> Labeled:
    """Return a record that has a label; a DataError if it is of another kind."""
    if not isinstance(record, Labeled):
        raise unfit(
            record, "has no label; use rows with 'text' and 'label', or select them with --format and --columns"
        )
    return record


def _tags(record: Record) -> tuple[str, ...]:
    if not isinstance(record, Tagged):
        raise unfit(record, "has no tags; use rows with 'tokens' and 'tags'")
    if record.words and not record.tags:
        raise unfit(record, "has no tags")
    return record.tags


def unfit(record: Record, problem: str) -> DataError:
    """Return an error about a row."""
    return DataError(f"{location(record)}: the row {problem}.", where=location(record), field="data")
