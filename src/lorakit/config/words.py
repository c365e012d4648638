"""The words of a config: task types, method types, file name, the level of PEFT that is followed, and the scale rule.

This file knows nothing about fields or files.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping

API_LEVEL = "0.22.0"
"""The level of PEFT's interface and files that is followed here."""

CONFIG_FILE = "adapter_config.json"
BIAS_CHOICES = ("none", "all", "lora_only")


class TaskType(str, enum.Enum):
    """What the adapted model is for; the names are PEFT's."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """PEFT's methods by name, since programs compare against them; this library is LORA alone."""

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


HEADS_BY_TASK: Mapping[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Heads that start untrained and so are copied and trained whole; a model has at least one of them."""


def scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """The factor before B·A: alpha / r, or alpha / √r for rsLoRA.   [docs/math.md (3), (4)]

    Args:
        r: Rank of the factor, at least 1.
        lora_alpha: The config's alpha at this site.
        use_rslora: Divide by the root of the rank.

    Returns:
        The scale, without unit.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732, eq. (4).
    """
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
