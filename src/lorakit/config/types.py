"""Constants, types and helpers for configs: task types, the scale formula, and type checks for fields.

The type checks tolerate the different forms that a value can take in Python and in JSON: tuples, sets and lists are
interchangeable, integers are accepted as floats, and None is accepted as False. Booleans are not accepted as numbers.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, Protocol, TypeAlias

from lorakit.errors import ConfigTypeError

Value: TypeAlias = "str | bytes | float | os.PathLike[str] | Mapping[str, Value] | Iterable[Value] | None"
"""The value of a field, as a user or a file provides it: a JSON value, or any iterable in place of a list."""

Hint: TypeAlias = "type | types.UnionType | types.GenericAlias"
"""A field's type annotation."""


class Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


API_LEVEL = "0.22.0"
"""Version of PEFT whose interface and file format lorakit follows."""

SIDECAR_FILE = "lorakit.json"


class TaskType(str, enum.Enum):
    """Task of the adapted model; the names are PEFT's."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """Names of PEFT's methods, for programs that compare them; lorakit supports only LORA."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


HEADS_BY_TASK: Mapping[TaskType | str | None, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Dict from task types to possible names of the task head, which starts untrained and is trained and saved in full."""


def scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Return the factor that multiplies B·A: alpha / r, or alpha / √r for rsLoRA.   [docs/math.md (3), (4)]

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732, eq. (4).
    """
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


_PLAIN: Mapping[Hint, tuple[type | tuple[type, ...], str, str]] = {
    bool: (bool, "true or false", "booleans"),
    int: (numbers.Integral, "an integer", "integers"),
    float: (numbers.Real, "a number", "numbers"),
    str: ((str, os.PathLike), "a string", "strings"),
    type(None): (type(None), "None", "None"),
}
"""Dict from annotations to the accepted types, with the singular and plural forms used in messages."""


def check_types(config: Dataclass, leave: Collection[str] = ()) -> None:
    """Check the fields of a dataclass, except those to `leave`, against annotations, or raise a ConfigTypeError."""
    for name, hint in _hints(config.__class__).items():
        value = getattr(config, name)
        if name not in leave and not _fits(value, hint):
            raise ConfigTypeError.of(name, value, _words(hint))


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return a dict from field names to annotations, omitting fields added by classes outside lorakit."""
    ours = next(part for part in kind.__mro__ if part.__module__.partition(".")[0] == "lorakit")
    return typing.get_type_hints(ours)


def plain(value: Value) -> Value:
    """Copy a value for storage: numbers become Python ints or floats; ranges, arrays and generators become lists."""
    if value is None or isinstance(value, (bool, str, bytes)):
        return value
    if isinstance(value, (numbers.Integral, numbers.Real)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return set(value)
    if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return value
    entries = [plain(entry) for entry in value]
    return tuple(entries) if isinstance(value, tuple) else entries


def _fits(value: Value, hint: Hint) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inside)
    if hint in _PLAIN:
        if hint is bool:
            return value is None or isinstance(value, bool)
        return isinstance(value, _PLAIN[hint][0]) and not isinstance(value, bool)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(_fits(key, inside[0]) for key in value):
            return False
        return inside[1] is Any or all(_fits(entry, inside[1]) for entry in value.values())
    if origin in (list, set, tuple):
        if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
            return False
        entries = list(value)
        return (origin is not tuple or len(entries) == len(inside)) and all(_fits(each, inside[0]) for each in entries)
    return isinstance(hint, type) and isinstance(value, hint)


def _words(hint: Hint, many: bool = False) -> str:
    """Describe an annotation in English, such as "a list of integers, or None"."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_words(option) for option in inside))
    if hint in _PLAIN:
        _, one, several = _PLAIN[hint]
        return several if many else one
    if origin is dict:
        return "a dict of " + ("anything" if inside[1] is Any else _words(inside[1], many=True))
    if origin is tuple:
        return f"{'lists' if many else 'a list'} of {len(inside)} {_words(inside[0], many=True)}"
    if origin in (list, set):
        return f"{'lists' if many else 'a list'} of {_words(inside[0], many=True)}"
    return f"a {getattr(hint, '__name__', hint)}"
