"""The shapes of data rows: the columns that a row has, and the record that is built from them.

All rows of a file have the same shape, recognized by its columns, or selected by name or a mapping of fields to
columns.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorakit.data.messages import (
    BadRow,
    Values,
    chat_of,
    check_value,
    completion_of,
    document_of,
    instruction_of,
    labeled_of,
    named,
    question_of,
    tagged_of,
    text_pair_of,
    translation_of,
)
from lorakit.data.records import Record, Records
from lorakit.durable import JsonObject, JsonValue, as_object
from lorakit.errors import ConfigError, DataError, nearest

LABELS = ("label", "tags", "target")
"""The fields that a model predicts."""


@dataclass(frozen=True)
class Shape:
    """A set of fields that together describe a training example.

    Attributes:
        needed: Required field -> names of the columns that can supply it, in order of preference.
        optional: Optional field -> names of the columns that can supply it.
        build: Function that builds the record from the fields' values, or None if training does not support the shape.
        derived: Columns that repeat the other columns in rendered form and are ignored.
        remedy: What the user can do instead, if `build` is None.
        is_shown: Whether the shape is always shown to the user, because its fields are rendered as a conversation.
        ignored: Columns that are not read.
        partners: Column -> the column without which it does not supply its field.
    """

    name: str
    needed: Mapping[str, tuple[str, ...]]
    build: Callable[[Values], Record] | None
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    remedy: str = ""
    is_shown: bool = False
    ignored: tuple[str, ...] = ()
    partners: Mapping[str, str] = field(default_factory=dict)

    def supplier(self, candidates: Iterable[str], columns: Sequence[str]) -> str | None:
        """Return the first of the candidates for a field that is among the columns, or None."""
        return next((one for one in candidates if one in columns and self.partners.get(one, one) in columns), None)

    def without_label(self, columns: Mapping[str, str]) -> Shape:
        """Return the same shape, in which the columns of labels, tags and targets are ignored, whatever they hold."""
        needed = {name: names for name, names in self.needed.items() if name not in LABELS}
        optional = {name: names for name, names in self.optional.items() if name not in LABELS}
        fields = {**self.needed, **self.optional}
        ignored = [name for key in LABELS for name in (*fields.get(key, ()), columns.get(key)) if name is not None]
        return replace(self, needed=needed, optional=optional, ignored=tuple(ignored))

    def described(self) -> str:
        """Return the shape's required columns as text, such as "'prompt' and 'completion'"."""
        return " and ".join(f"'{columns[0]}'" for columns in self.needed.values())


_CHAT = {"tools": ("tools",), "chat_template_kwargs": ("chat_template_kwargs",)}
_SYSTEM = {"system": ("system", "system_prompt")}

SHAPES: tuple[Shape, ...] = (
    Shape("text", {"text": ("text",)}, document_of),
    Shape(
        "prompt-completion",
        {"prompt": ("prompt",), "completion": ("completion", "response")},
        completion_of,
        optional=_CHAT,
    ),
    Shape("messages", {"messages": ("messages",)}, chat_of, optional={**_CHAT, **_SYSTEM}),
    Shape(
        "alpaca",
        {"instruction": ("instruction",), "output": ("output", "response")},
        instruction_of,
        optional={"input": ("input", "context"), **_SYSTEM},
        derived=("text",),
        is_shown=True,
    ),
    Shape("sharegpt", {"messages": ("conversations", "conversation")}, chat_of, optional={**_CHAT, **_SYSTEM}),
    Shape(
        "question-answer",
        {"question": ("question",), "answer": ("answer",)},
        question_of,
        optional={"context": ("context",), **_SYSTEM},
        is_shown=True,
    ),
    Shape("classification", {"text": ("text", "sentence"), "label": ("label", "labels")}, labeled_of, is_shown=True),
    Shape(
        "text-pair",
        {
            "first": ("sentence1", "text1", "premise", "anchor", "query", "text"),
            "second": ("sentence2", "text2", "hypothesis", "positive", "text_pair"),
        },
        text_pair_of,
        optional={"label": ("label", "labels", "score"), "negative": ("negative",)},
        is_shown=True,
        partners={"text": "text_pair"},
    ),
    Shape(
        "token-classification", {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags")}, tagged_of, is_shown=True
    ),
    Shape("source-target", {"source": ("source",), "target": ("target",)}, translation_of, is_shown=True),
    Shape(
        "preference",
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        None,
        optional={"prompt": ("prompt",)},
        remedy="Preference optimization is not supported; to train on the chosen answers, pass --columns, such as "
        "prompt=prompt completion=chosen or messages=chosen",
    ),
)
"""The shapes, in the order in which error messages list them."""

TRAINABLE = tuple(shape for shape in SHAPES if shape.build is not None)
"""The shapes that training supports."""


@dataclass(frozen=True)
class Request:
    """The user's choices about how rows are read.

    Attributes:
        format: Name of the shape, or None to recognize it.
        columns: Field -> column, for fields that a file calls by another name.
        skip_bad_rows: Whether to leave out rows that do not fit and count them, instead of raising an error.
        group: Column whose equal values keep rows together when rows are held out, or None.
        allowed: Names of the shapes that may be recognized, because the task supports them; empty allows all.
        needs_label: Whether labels and tags are required; those of rows to predict are not read.
        usual: Choices that apply to files whose columns fit them, such as those of an adapter's training; or None.

    Raises:
        ConfigError: The shape is unknown or not allowed, or no shape has these fields.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad_rows: bool = False
    group: str | None = None
    allowed: tuple[str, ...] = ()
    needs_label: bool = True
    usual: Request | None = None

    def __post_init__(self) -> None:
        names = self.allowed or tuple(shape.name for shape in SHAPES)
        if self.format is not None and self.format not in names:
            raise ConfigError.of("format", self.format, allowed=names)
        known = {name for shape in self._allowed() for name in (*shape.needed, *shape.optional)}
        for name in self.columns:
            if name not in known:
                raise ConfigError.of("columns", name, allowed=sorted(known))

    def with_usual(self, trained: JsonValue) -> Request:
        """Return these choices, and for files that they fit, those of an adapter's training, over which these win."""
        facts = as_object(trained)
        shape, columns = facts.get("shape"), facts.get("columns")
        if not isinstance(shape, str) or not isinstance(columns, dict) or self.format not in (None, shape):
            return self
        with contextlib.suppress(ConfigError):  # a task that predicts other shapes than it was trained on
            columns = {**{str(name): str(column) for name, column in columns.items()}, **self.columns}
            return replace(self, usual=replace(self, format=shape, columns=columns))
        return self

    def shapes(self) -> tuple[Shape, ...]:
        """Return the shapes that may be recognized."""
        shapes = self._allowed()
        return shapes if self.needs_label else tuple(shape.without_label(self.columns) for shape in shapes)

    def _allowed(self) -> tuple[Shape, ...]:
        return tuple(
            shape
            for shape in SHAPES
            if self.format in (None, shape.name) and (not self.allowed or shape.name in self.allowed)
        )


@dataclass(frozen=True)
class Layout:
    """The shape of a file's rows, and the columns that supply its fields.

    Attributes:
        columns: Field that every row has -> column: the required fields, and the label if the first row has one.
        optional: Optional field -> columns that can supply it; each row uses the first that it has.
        is_unusual: Whether the columns do not fit the request's usual choices.
    """

    shape: Shape
    columns: Mapping[str, str]
    optional: Mapping[str, tuple[str, ...]]
    is_unusual: bool = False

    def record(self, row: JsonValue, source: str, line: int | None, unused: Counter[str] | None = None) -> Record:
        """Build the record of a row, and count its unused columns in place.

        Raises:
            BadRow: The row has other columns, a value of the wrong type, or text that is not valid.
        """
        row = checked_row(row)
        lacking = [column for column in self.columns.values() if column not in row]
        if lacking:
            raise BadRow(
                f"the field '{lacking[0]}' is missing; the file's first row has "
                f"{' and '.join(map(repr, self.columns.values()))}, and this one has {_listed(row)}."
            )
        unlabeled = [column for name, column in self.columns.items() if name in LABELS and row[column] is None]
        if unlabeled:
            raise BadRow(
                f"the field '{unlabeled[0]}' is null (or -1, if it has class names), so the row has no label; label or "
                "remove such rows, or remove the column if no row has a label."
            )
        columns = dict(self.columns)
        for name, candidates in self.optional.items():
            column = next((column for column in candidates if column in row), None)
            if column is not None:
                columns[name] = column
        used = columns.values()
        for name, value in row.items():
            check_value(value, name, is_used=name in used)
        unused = Counter() if unused is None else unused
        skipped = {*used, *self.shape.derived, *self.shape.ignored}
        unused.update(name for name in row if name not in skipped)
        assert self.shape.build is not None  # `recognize` rejects other shapes
        return self.shape.build(Values(row, columns, source, line, unused))

    def is_notable(self) -> bool:
        """Return whether the shape or its columns were inferred, so that the user should see them."""
        return self.shape.is_shown or self.is_unusual or any(name != column for name, column in self.columns.items())

    def text(self) -> str:
        """Return the shape, the columns that supply fields of another name, and whether they are unusual."""
        renamed = [f"{name} from '{column}'" for name, column in self.columns.items() if name != column]
        text = f"{self.shape.name} ({', '.join(renamed)}) rows" if renamed else f"{self.shape.name} rows"
        return f"{text}, unlike the adapter's training data" if self.is_unusual else text


def text_records(texts: Sequence[str], request: Request) -> Records:
    """Return a record for each text, which supplies the only required field of a shape; words are split at spaces.

    Raises:
        ConfigError: No allowed shape consists of one text.
        DataError: A text contains an unpaired surrogate.
    """
    shape = next((shape for shape in request.shapes() if len(shape.needed) == 1), None)
    if shape is None:
        raise ConfigError("text: the rows of this task are more than one text; pass them in a file.", field="text")
    (name,) = shape.needed
    layout = Layout(shape, {name: name}, {})
    rows = [{name: text.split() if name == "tokens" else text} for text in texts]
    try:
        return Records(layout.record(row, "--text", at) for at, row in enumerate(rows, start=1))
    except BadRow as cause:
        raise DataError(f"--text: {cause}", field="text") from None


def common_layout(layouts: Iterable[Layout | None]) -> tuple[str | None, dict[str, str]]:
    """Return the shape and the columns that all files share, or None and {}; the layout None is a text file's."""
    all_layouts = list(layouts)
    names = {"text" if layout is None else layout.shape.name for layout in all_layouts}
    columns = [dict(layout.columns) for layout in all_layouts if layout is not None]
    same = len(names) == 1 and all(one == columns[0] for one in columns)
    return (names.pop() if len(names) == 1 else None), (columns[0] if same and columns else {})


def checked_row(row: JsonValue) -> JsonObject:
    """Return a row if it is a JSON object with valid names; its values are checked when its record is built.

    Raises:
        BadRow: The row is not a JSON object, or the name of a column contains an unpaired surrogate.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, not {named(row)}.")
    check_value(list(row), "names of the columns")
    return row


def recognize(columns: Sequence[str], request: Request) -> Layout:
    """Find the shape of a file's rows, given its columns or those of its first row.

    Raises:
        BadRow: The columns do not fit exactly one shape, or training does not support the shape.
    """
    if request.usual is not None:
        with contextlib.suppress(BadRow):
            return recognize(columns, request.usual)
        return replace(recognize(columns, replace(request, usual=None)), is_unusual=True)
    bound = [(shape, binding) for shape in request.shapes() if (binding := _bound(shape, columns, request)) is not None]
    if request.format is None:
        bound = [(shape, binding) for shape, binding in bound if not _is_covered(shape, binding, bound)]
    if len(bound) > 1:
        names = " and ".join(shape.name for shape, _ in bound)
        raise BadRow(f"the columns {_listed(columns)} fit several shapes, {names}; select one with --format.")
    if not bound:
        raise BadRow(_unrecognized(columns, request))
    shape, binding = bound[0]
    if shape.build is None:
        raise BadRow(
            f"these are {shape.name} rows ({_listed(columns)}), which cannot be trained on yet. {shape.remedy}."
        )
    optional = {
        name: (request.columns[name],) if name in request.columns else candidates
        for name, candidates in shape.optional.items()
        if name not in binding
    }
    return Layout(shape, binding, optional)


def _bound(shape: Shape, columns: Sequence[str], request: Request) -> dict[str, str] | None:
    """Return the columns of a shape's required fields and of its label, or None if the shape does not fit."""
    fields = {*shape.needed, *shape.optional, *(() if request.needs_label else LABELS)}
    if not request.columns.keys() <= fields:
        return None
    binding = {}
    labels = {name: candidates for name, candidates in shape.optional.items() if name in LABELS}
    for name, candidates in {**shape.needed, **labels}.items():
        same_name = (name,) if request.format == shape.name and name in shape.needed else ()
        given = request.columns.get(name)
        column = shape.supplier((*candidates, *same_name), columns) if given is None else given
        if column is not None and column in columns:
            binding[name] = column
        elif name in shape.needed:
            return None
    return binding


def _is_covered(shape: Shape, binding: Mapping[str, str], bound: Sequence[tuple[Shape, Mapping[str, str]]]) -> bool:
    """Return whether another shape explains the same columns and more."""
    used = set(binding.values())
    return any(
        other is not shape and (used < set(theirs.values()) or used <= {*theirs.values(), *other.derived} > used)
        for other, theirs in bound
    )


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in list(columns)[:8]) or "no columns"


def _unrecognized(columns: Sequence[str], request: Request) -> str:
    missing = [f"'{column}'" for column in request.columns.values() if column not in columns]
    if missing:
        return f"there is no column {' or '.join(missing)}; the columns are {_listed(columns)}."
    shapes = request.shapes() if request.format or request.allowed else TRAINABLE
    allowed = ", ".join(f"{shape.described()} ({shape.name})" for shape in shapes)
    halves = [
        (name, shape)
        for shape in shapes
        for name, candidates in shape.needed.items()
        if len(shape.needed) > 1 and shape.supplier(candidates, columns) is None and _some_present(shape, columns)
    ]
    if len(halves) == 1:
        name, shape = halves[0]
        return (
            f"the field '{name}' is missing; {shape.name} rows have {shape.described()}. Use --columns {name}=COLUMN."
        )
    fields = sorted({column for shape in shapes for candidates in shape.needed.values() for column in candidates})
    close = [f"'{near}' instead of '{name}'" for name in columns for near in nearest(name.lower(), fields, 1)]
    hint = f" Did you mean {', '.join(close[:2])}?" if close else ""
    advice = "Name the columns with --columns, such as prompt=COLUMN."
    return f"the columns {_listed(columns)} are not recognized; rows must have {allowed}.{hint} {advice}"


def _some_present(shape: Shape, columns: Sequence[str]) -> bool:
    return any(shape.supplier(candidates, columns) is not None for candidates in shape.needed.values())
