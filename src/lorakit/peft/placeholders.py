"""Placeholders for PEFT names that lorakit does not implement: other methods and variants, and PEFT's internals.

Other programs import these classes and pass them to `isinstance`. Creating an instance or calling a function raises
`NotYetSupported`. Also PEFT's error names, as aliases of lorakit's error classes, and PEFT's warning classes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

from lorakit.config import PeftConfig, PeftType
from lorakit.errors import LorakitError as PeftError
from lorakit.errors import NotYetSupported
from lorakit.errors import TargetError as NoMatchingPeftModuleError
from lorakit.peft.paths import names_in

__all__ = ["NoMatchingPeftModuleError", "PeftError"]

_PROMPTS, _TARGET_TABLES = (frozenset(names_in([group])) for group in ("@prompts", "@target_tables"))
_CONFIGS = {
    name.removesuffix("Config").upper(): name for name in names_in(["@other_methods"]) if name.endswith("Config")
}
CONFIGS: Mapping[PeftType, str] = {
    PeftType.P_TUNING: "PromptEncoderConfig",
    **{method: _CONFIGS[key] for method in PeftType if (key := method.value.replace("_", "")) in _CONFIGS},
}
"""Name of the config class of each PEFT method other than LoRA."""


class PeftWarning(UserWarning):
    """Base class of PEFT's warnings; a filter for this class also catches the warnings of `lorakit.peft`."""


class PartialTargetsWarning(PeftWarning, RuntimeWarning):
    """Warning about a config entry that matches nothing; a subclass of both warning types that PEFT uses for this."""


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        text = f"{name} belongs to another PEFT method or to PEFT's internals. lorakit has only LoRA; use LoraConfig."
        raise NotYetSupported(text, what=name)

    refuse.__name__ = name
    return refuse


class PromptLearningConfig(PeftConfig):
    """Base class of PEFT's configs for learned prompts; creating an instance raises an error."""

    __init__ = _refusing("PromptLearningConfig")


def _text_enum(name: str, members: str) -> type[enum.Enum]:
    """Create a string enumeration in which each member's value is its name."""
    return enum.Enum(name, {member: member for member in members.split()}, type=str, module=__name__)  # type: ignore[return-value]


PromptTuningInit = _text_enum("PromptTuningInit", "TEXT SAMPLE_VOCAB RANDOM")
"""PEFT's initialization methods for a learned prompt."""
MultitaskPromptTuningInit = _text_enum(
    "MultitaskPromptTuningInit", "TEXT RANDOM AVERAGE_SOURCE_TASKS EXACT_SOURCE_TASK ONLY_SOURCE_SHARED"
)
"""PEFT's initialization methods for a prompt shared by several tasks."""
PromptEncoderReparameterizationType = _text_enum("PromptEncoderReparameterizationType", "MLP LSTM")
"""PEFT's prompt encoder types."""


def register_peft_method(*, name: str, **_: type | str | bool | None) -> NoReturn:
    """Raise an error, since lorakit implements only LoRA and does not accept additional methods.

    Raises:
        NotYetSupported: Always.
    """
    text = f"The method {name!r} cannot be added; LoRA can be extended through the registries in lorakit.core."
    raise NotYetSupported(text, what=name)


@cache
def placeholder(name: str) -> Any:
    """Return what this module defines under a PEFT name or, if there is nothing, a placeholder, always the same."""
    if name in globals() and not name.startswith("_"):
        return globals()[name]
    if name in _TARGET_TABLES:
        return {}
    if not name.lstrip("_")[:1].isupper():
        return _refusing(name)
    base: type = object
    if name.endswith("Config"):
        base = PromptLearningConfig if name in _PROMPTS else PeftConfig
    about = f"Placeholder for PEFT's {name}, which lorakit does not implement and which cannot be instantiated."
    return type(name, (base,), {"__init__": _refusing(name), "__doc__": about, "__module__": __name__})
