"""PEFT's other methods, by name alone: other programs list them in imports and ask `isinstance`; none can be made here.

One table of names gives the classes. Making one raises a sentence, since this library is LoRA.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

from lorakit.config import PeftConfig, PeftType
from lorakit.errors import NotYetSupported

_NAMES = """
ADALORA AdaLora · ADAMSS Adamss · ADAPTION_PROMPT AdaptionPrompt · BEFT Beft · BOFT BOFT · C3A C3A · DEFT Deft
DELORA Delora · FOURIERFT FourierFT · FROD Frod · GLORA Glora · GRALORA Gralora · HIRA Hira · HRA HRA · IA3 IA3
LILY Lily · LN_TUNING LNTuning · LOHA LoHa · LOKR LoKr · MISS Miss · OFT OFT · OSF OSF · PEANUT Peanut · POLY Poly
PSOFT Psoft · PVERA Pvera · RANDLORA RandLora · ROAD Road · SHADOW Shadow · SHIRA Shira · SUPERTUNING Supertuning
TINYLORA TinyLora · TRAINABLE_TOKENS TrainableTokens · UNILORA UniLora · VBLORA VBLoRA · VERA Vera · WAVEFT WaveFT
XLORA XLora
"""
METHODS: Mapping[PeftType, str] = {
    PeftType(word): stem
    for line in _NAMES.strip().splitlines()
    for word, stem in (pair.split() for pair in line.split(" · "))
}
"""Method -> what its classes' names begin with: `<stem>Config`, `<stem>Model`, `<stem>Layer`."""

PROMPT_METHODS: Mapping[PeftType, str] = {
    PeftType.CARTRIDGE: "CartridgeConfig",
    PeftType.CPT: "CPTConfig",
    PeftType.MULTITASK_PROMPT_TUNING: "MultitaskPromptTuningConfig",
    PeftType.PREFIX_TUNING: "PrefixTuningConfig",
    PeftType.PROMPT_TUNING: "PromptTuningConfig",
    PeftType.P_TUNING: "PromptEncoderConfig",
}
"""Methods that learn a prompt -> their config."""


_TABLES = """
ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HRA IA3 IA3_FEEDFORWARD LILY LNTUNING
LOHA LOKR MISS OFT PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT
"""
TARGET_TABLES = " ".join(
    f"TRANSFORMERS_MODELS_TO_{word}_MODULES_MAPPING"
    for word in (word if word.endswith("_FEEDFORWARD") else f"{word}_TARGET" for word in _TABLES.split())
)
"""Names of other methods' tables of default targets, which are empty here."""


class PromptLearningConfig(PeftConfig):
    """What PEFT's configs of learned prompts have in common; none can be made here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        _refuse(type(self).__name__)


class PromptTuningInit(str, enum.Enum):
    """How PEFT starts a learned prompt."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(str, enum.Enum):
    """How PEFT starts a prompt that several tasks share."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What PEFT's prompt encoder is made of."""

    MLP = "MLP"
    LSTM = "LSTM"


@cache
def placeholder(name: str) -> Any:
    """The class or function of another method that stands for its name; the same object each time.

    Args:
        name: A name of PEFT's; tables of names ask for what PEFT has, and nothing else.
    """
    if name in globals() and not name.startswith("_"):
        return globals()[name]
    if name in TARGET_TABLES.split():
        return {}
    if not name.lstrip("_")[:1].isupper():
        return _refusing(name)
    base: type = object
    if name.endswith("Config"):
        base = PromptLearningConfig if name in PROMPT_METHODS.values() else PeftConfig
    about = f"A name of PEFT's: {name} belongs to another method and cannot be made here."
    return type(name, (base,), {"__init__": _refusing(name), "__doc__": about, "__module__": __name__})


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        _refuse(name)

    refuse.__name__ = name
    return refuse


def _refuse(name: str) -> NoReturn:
    raise NotYetSupported(f"{name} belongs to another method of PEFT, and this library is LoRA. Use LoraConfig.")
