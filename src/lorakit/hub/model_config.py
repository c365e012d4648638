"""What a model's config says: its family, the classes of its head, and how it embeds texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorakit.durable import JsonValue
from lorakit.hub.quiet import quiet_transformers
from lorakit.hub.sources import ModelSource, call_loader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TASKS = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "encoder": "AutoModel",
}
"""Task -> transformers class that loads a model for that task."""

WITH_NEW_HEADS = ("classification", "token-classification")
"""Tasks whose models get a new head if their files have none."""

Family = Literal["causal", "seq2seq", "encoder", "embedding"]
"""What a model was made for: to continue text, to map one text to another, to classify or fill in words, or to embed
texts (a model saved by sentence-transformers)."""

_POOLING = "1_Pooling/config.json"
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")


def config_of(source: ModelSource, values: Mapping[str, JsonValue] | None = None) -> PreTrainedConfig:
    """Return a model's config.

    Args:
        source: Result of `resolve`.
        values: Values to replace, such as `id2label`, whose keys may be strings.

    Raises:
        ModelError: The config cannot be read.
    """
    import transformers

    with quiet_transformers():
        config = call_loader(source, transformers.AutoConfig.from_pretrained)
    for name, value in (values or {}).items():
        setattr(config, name, _by_number(value) if name == "id2label" and isinstance(value, dict) else value)
    return config


def _by_number(table: Mapping[str, JsonValue]) -> dict[int, JsonValue]:
    return {int(key): value for key, value in table.items()}


def family_of(source: ModelSource) -> Family:
    """Return what a model was made for, according to its config.

    Args:
        source: Result of `resolve`.

    Raises:
        ModelError: The config cannot be read.
    """
    import transformers

    if _file(source, "modules.json") is not None:
        return "embedding"
    config = config_of(source)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    if getattr(config, "is_decoder", False) or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    return "encoder" if masked else "causal"


def labels_of(source: ModelSource) -> tuple[str, ...]:
    """Return the names of the classes of a model's head, in order; empty if it has no head or no names.

    Args:
        source: Result of `resolve`.

    Raises:
        ModelError: The config cannot be read.
    """
    names = getattr(config_of(source), "id2label", None) or {}
    found = tuple(str(names[number]) for number in sorted(names))
    return () if all(_DEFAULT_LABEL.fullmatch(name) for name in found) else found


def pooling_of(source: ModelSource) -> str:
    """Return how a model computes the embedding of a text: "cls" (that of the first token) or "mean".

    Args:
        source: Result of `resolve`; a directory saved by sentence-transformers has a file that says this.
    """
    path = _file(source, _POOLING)
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        values = {}
    return "cls" if isinstance(values, dict) and values.get("pooling_mode_cls_token") is True else "mean"


def _file(source: ModelSource, name: str) -> Path | None:
    """Return a file of a model, from its directory or the Hub's cache, or None."""
    if source.kind != "hub":
        path = Path(source.path_or_id) / name
        return path if path.is_file() else None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(source.path_or_id, name)
    return Path(found) if isinstance(found, str) else None
