"""Settings and their types: allowed words, and functions that convert a value from a flag or a file.

A function raises ValueError with a message that says what the value must be; `TrainSettings` adds the setting's name.
This module imports neither pydantic nor torch, because the flags of commands are made from these types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from lorakit.choices import DTYPE_NAMES, FORMATS, INITS, TRACKERS, Dtype
from lorakit.errors import ConfigError, did_you_mean, nearest
from lorakit.machine import DEVICE_FORM, is_device_name

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

    from lorakit.durable import JsonValue


Given: TypeAlias = "JsonValue | Path | Sequence[str | Path] | Mapping[str, float]"
"""An unchecked value from a flag, a file or calling code."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Before:
    """Marks a type whose values a function converts before pydantic checks them."""

    convert: Callable[[Any], Any]
    validator: ClassVar[str] = "BeforeValidator"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        import pydantic

        return getattr(pydantic, self.validator)(self.convert).__get_pydantic_core_schema__(source, handler)


class After(Before):
    """Marks a type whose values a function checks or converts after pydantic has checked them."""

    validator = "AfterValidator"


class NotEmpty:
    """Marks a type whose values must not be empty; it is the first mark of the type."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        from pydantic import Field

        return handler.generate_schema(Annotated[source, Field(min_length=1)])


Scheduler = Literal["cosine", "linear", "constant", "wsd"]
OnBadRow = Literal["stop", "skip"]
Streaming = Literal["auto", "on", "off"]
Allocation = Literal["none", "gradients", "inputs"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

SHARDED = ("fsdp", "hsdp")
"""Values of the setting `parallel` for which the base is sharded."""


def one_or_many(value: Value) -> Value | list[Any]:
    """Wrap a single path in a list, and convert paths to strings."""
    if isinstance(value, (str, Path)):
        return [str(value)]
    return [path_text(item) for item in value] if isinstance(value, (list, tuple)) else value


def path_text(value: Value) -> Value | str:
    """Convert a path to a string; return other values unchanged."""
    return str(value) if isinstance(value, Path) else value


def targets_of(value: Value) -> Value | str | list[Any]:
    """Unwrap a list that contains only "all-linear" or only a pattern, because flags always pass lists."""
    if not isinstance(value, (list, tuple, set)):
        return value
    names = list(value)
    alone = names[0] if len(names) == 1 and isinstance(names[0], str) else ""
    return alone if alone == "all-linear" or set(alone) & set(r"*+?^$|()[]{}\\") else names


def _table(
    value: Given,
    form: str,
    read: Callable[[Any], Any],
    read_name: Callable[[Any], str | None],
    split: Callable[[str, str], tuple[str, str, str]] = str.rpartition,
) -> dict[str, Any]:
    """Return a dict for a mapping or NAME=VALUE words from flags, or raise ValueError, which states the `form`.

    `read` and `read_name` return None for what is not a value or a name.
    """
    words = value if isinstance(value, Mapping) else one_or_many(value)
    if isinstance(words, Mapping):
        pairs = list(words.items())
    elif isinstance(words, list):
        pairs = [split(str(word), "=")[::2] for word in words]
    else:
        raise ValueError(f"it must map names to values, as {form}")
    table = {read_name(name): read(given) for name, given in pairs}
    if len(table) < len(pairs) or None in [*table, *table.values()]:
        raise ValueError(f"each entry must be {form}; each name once")
    return {name: given for name, given in table.items() if name is not None}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    """Return a number, also for its text, or None."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 < number < math.inf else None


def rates_of(value: Given) -> dict[str, float]:
    """Return a dict from pattern to rate for a mapping or PATTERN=RATE strings from flags, or raise ValueError."""
    table = _table(value, "PATTERN=RATE with a rate above 0, such as down_proj=1e-4", _positive, _text)
    for pattern in table:
        try:
            re.compile(pattern)
        except re.error as cause:
            raise ValueError(f"{pattern!r} is not a valid regular expression ({cause})") from None
    return table


def weights_of(value: Given) -> dict[str, float]:
    """Return a dict from name to weight for a mapping or NAME=WEIGHT strings from flags, or raise ValueError."""
    return _table(value, "NAME=WEIGHT with a weight above 0, such as a.jsonl=2", _positive, _text)


def numbers_of(value: Given) -> Mapping[str, float]:
    """Return a dict from pattern to number for PATTERN=NUMBER strings, or raise ValueError; keep a mapping."""
    if isinstance(value, Mapping):
        return value
    table = _table(value, "PATTERN=NUMBER, such as down_proj=32", _number, _text)
    return {pattern: int(number) if number.is_integer() else number for pattern, number in table.items()}


def tokens_of(value: Given) -> list[str]:
    """Return a list of tokens for a list, or a comma-separated string from a flag, or raise ValueError."""
    if isinstance(value, str):
        value = [token.strip() for token in value.split(",")]
    if not isinstance(value, (list, tuple)) or not all(isinstance(token, str) for token in value):
        raise ValueError("it must be a list of strings")
    if not all(value):
        raise ValueError("a token must not be empty")
    twice = [token for number, token in enumerate(value) if token in value[:number]]
    if twice:
        raise ValueError(f"{twice[0]!r} occurs twice")
    return list(value)


def trackers_of(value: Given) -> list[str]:
    """Return a list of trackers, also for comma-separated words; empty for "none"; or raise ValueError."""
    words = one_or_many(value)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"it must be a list of {', '.join(TRACKERS)}")
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name not in (*TRACKERS, "none"):
            raise ValueError(f"it must be a list of {', '.join(TRACKERS)}, or none.{did_you_mean(name, TRACKERS)}")
    return [name for name in dict.fromkeys(names) if name != "none"]


def columns_of(value: Given) -> dict[str, str]:
    """Return a dict from field to column for a mapping or FIELD=COLUMN strings from flags, or raise ValueError."""
    return _table(value, "FIELD=COLUMN, such as prompt=question", _text, _text, str.partition)


def label_map_of(value: Given) -> dict[str, str]:
    """Return a dict from a label in the data to its name for a mapping or NAME=NAME strings, or raise ValueError."""
    return _table(value, "NAME=NAME: a label in the data, and its name in the model", _label, _label)


def _label(value: Any) -> str | None:
    """Return the text of a label, which may be an integer, without spaces around it, or None."""
    return (str(value).strip() or None) if type(value) in (str, int) else None


PAIRS: Mapping[str, Callable[[Given], dict[str, str]]] = {"columns": columns_of, "label_map": label_map_of}
"""Name of a setting that maps names to names -> function that checks it."""


def ranges_of(value: Given) -> list[Any]:
    """Return a list of pairs for FIRST:END strings from flags, or raise ValueError; other lists stay as they are."""
    words = one_or_many(value)
    if not isinstance(words, list):
        raise ValueError("it must be a list of ranges, such as 0:16 8:24")
    pairs = [word.split(":") if isinstance(word, str) else list(word) for word in words]
    if not all(len(pair) == 2 and all(isinstance(one, int) or str(one).isdigit() for one in pair) for pair in pairs):
        raise ValueError("each range must be FIRST:END, such as 0:16")
    return [[int(first), int(end)] for first, end in pairs]


def part_of(value: Given) -> Given:
    """Parse a JSON object that was given as text, as flags are, or raise ValueError."""
    if not isinstance(value, str):
        return value
    from lorakit.durable import parse_json

    try:
        return parse_json(value)
    except (ValueError, RecursionError) as cause:
        raise ValueError(f"it must be a JSON object ({cause})") from None


def format_of(value: str) -> str:
    """Return the name of a shape, or raise ValueError."""
    if value not in FORMATS:
        raise ValueError(f"it must be one of {', '.join(FORMATS)}.{did_you_mean(value, FORMATS)}")
    return value


def dtype_word(value: Value) -> Value | str:
    """Return the full name of a dtype."""
    return DTYPE_NAMES.get(value, value) if isinstance(value, str) else value


def device_word(value: str) -> str:
    """Return the name of a device, or raise ValueError."""
    if not is_device_name(value):
        raise ValueError(f"it must be {DEVICE_FORM}")
    return value


def size_of(value: str) -> str:
    """Return a size in memory, such as 4GiB, or raise ValueError."""
    from lorakit.plan.budget import SIZE_FORM, bytes_of

    try:
        bytes_of(value)
    except ConfigError:
        raise ValueError(SIZE_FORM) from None
    return value


def init_word(value: str) -> str:
    """Return the name of an initialization, or raise ValueError."""
    if value not in INITS and not re.fullmatch(r"pissa_niter_\d{1,3}", value):
        close = nearest(value, list(INITS), 1)
        hint = f" (nearest: {close[0]})" if close else ""
        raise ValueError(f"it must be one of {', '.join(INITS)}, or pissa_niter_N{hint}")
    return value


Word = Annotated[str, NotEmpty()]
Names = Annotated[list[Word], Before(one_or_many)]
Part = Annotated[dict[str, Any] | None, Before(part_of)]
Text = Annotated[str, NotEmpty(), Before(path_text)]
Paths = Annotated[list[Word], NotEmpty(), Before(one_or_many)]
Targets = Annotated[str | list[str], NotEmpty(), Before(targets_of)]
Excluded = Annotated[str | list[str], Before(targets_of)]
Tokens = Annotated[list[str], Before(tokens_of)]
Ranges = Annotated[list[list[int]], Before(ranges_of)]
Ranks = Annotated[dict[str, int], Before(numbers_of)]
Numbers = Annotated[dict[str, float], Before(numbers_of)]
Rates = Annotated[dict[str, float], Before(rates_of)]
Weights = Annotated[dict[str, float], Before(weights_of)]
Columns = Annotated[dict[str, str], Before(columns_of)]
LabelMap = Annotated[dict[str, str], Before(label_map_of)]
TrackerNames = Annotated[list[str], Before(trackers_of)]
Format = Annotated[str, After(format_of)]
Init = Annotated[str, After(init_word)]
Device = Annotated[str, After(device_word)]
Precision = Annotated[Dtype, Before(dtype_word)]
Size = Annotated[str, After(size_of)]


@dataclass(frozen=True)
class Conflict:
    """Another setting that excludes a setting, unless the latter has its default.

    Attributes:
        other: Name of the other setting.
        excludes: Function that returns whether a value of the other setting excludes this one.
        text: What the error says after the name of the setting; {value} stands for the value of the other setting.
    """

    other: str
    excludes: Callable[[Any], bool]
    text: str


@dataclass(frozen=True)
class Setting:
    """A training setting: its meaning, its default, the reason for the default, its range, and what it excludes.

    Attributes:
        meaning: What the setting does, as shown in `--help-all`.
        value: The default; `...` if the setting is required, None if it is off or depends on other settings.
        reason: Reason for the default, as shown in `--help-all`; empty if the setting is required.
        shown: Text that stands for the default; None means `str(value)`, or "none", "on" or "off".
        brief: The meaning in a few words, for the settings that people change most; `--help` shows only these.
        group: Title of the group that the setting belongs to.
        alias: A shorter name, or "".
        is_changeable: Whether a resumed run may change the setting.
        is_for_new: Whether it applies only to a new adapter, not to one that is trained further.
        conflict: Another setting that excludes it, or None.
        ge, gt, le, lt: Bounds of the value, as in pydantic; None if there is none.
    """

    meaning: str
    value: Any
    reason: str = ""
    shown: str | None = None
    brief: str = ""
    group: str = ""
    alias: str = ""
    is_changeable: bool = False
    is_for_new: bool = False
    conflict: Conflict | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    @property
    def default(self) -> str:
        """The text that stands for the default."""
        if self.shown is not None:
            return self.shown
        if isinstance(self.value, bool):
            return "on" if self.value else "off"
        return "none" if self.value in (None, [], {}) else str(self.value)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by their names in pydantic."""
        bounds = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def check_conflict(self, name: str, given: Mapping[str, Any]) -> None:
        """Check the value of a setting with this entry against the `given` settings, which include it.

        Raises:
            ConfigError: The value of another setting excludes this one, which does not have its default.
        """
        conflict = self.conflict
        if conflict is None or given[name] == self.value or not conflict.excludes(given[conflict.other]):
            return
        text = conflict.text.format(value=given[conflict.other])
        raise ConfigError(f"{name} {text}", what=given[name], field=name)

    def help(self) -> str:
        """Return the help text of the setting: its meaning, its default and the reason for the default."""
        if self.value is ...:
            return f"{self.meaning}."
        return f"{self.meaning}. Default {self.default}: {self.reason}."
