"""A model's config, and the facts that it states: the family, the classes of the head, and how texts are embedded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorakit.durable import JsonValue
from lorakit.hub.quiet import quiet_transformers
from lorakit.hub.sources import WEIGHT_INDEX, WEIGHTS, ModelSource, call_loader

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
"""Purpose of a model: to continue text, to map one text to another, to classify or fill in words, or to embed
texts (a model saved by sentence-transformers)."""

_POOLING = "1_Pooling/config.json"
EMBEDDING_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", _POOLING)
"""Files that sentence-transformers adds to a model's directory."""

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


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model, read once from its config.

    Attributes:
        family: Purpose of the model.
        loader: Key of `TASKS` for the model class that the config names, or None.
        labels: Names of the classes of the head, in order, including names such as LABEL_0, which transformers adds to
            every config.
        problem: The config's `problem_type`, or None.
        padding: Id of the padding token, or None.
        pooling: How the model computes the embedding of a text: "cls" (that of the first token) or "mean".
    """

    family: Family
    loader: str | None
    labels: tuple[str, ...]
    problem: str | None
    padding: int | None
    pooling: str

    @property
    def named_labels(self) -> tuple[str, ...]:
        """The names of the classes; empty if all are default names."""
        return () if all(_DEFAULT_LABEL.fullmatch(name) for name in self.labels) else self.labels

    @classmethod
    def of(cls, source: ModelSource) -> ModelFacts:
        """Read the facts about a model.

        Args:
            source: Result of `resolve`; a directory saved by sentence-transformers says how it embeds texts.

        Raises:
            ModelError: The config cannot be read.
        """
        config = config_of(source)
        family = _family(config, is_embedding=file_of(source, "modules.json") is not None)
        names = getattr(config, "id2label", None) or {}
        return cls(
            family=family,
            loader=_loader(config, family),
            labels=tuple(str(names[number]) for number in sorted(names)),
            problem=getattr(config, "problem_type", None),
            padding=getattr(config, "pad_token_id", None),
            pooling=_pooling(source),
        )


def _architectures(config: PreTrainedConfig) -> list[str]:
    return [str(name) for name in getattr(config, "architectures", None) or ()]


def _family(config: PreTrainedConfig, *, is_embedding: bool) -> Family:
    import transformers

    if is_embedding:
        return "embedding"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    names = _architectures(config)
    if getattr(config, "is_decoder", False) or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    return "encoder" if type(config) in transformers.AutoModelForMaskedLM._model_mapping else "causal"


def _loader(config: PreTrainedConfig, family: Family) -> str | None:
    if family == "embedding":
        return "encoder"
    endings = {"ForSequenceClassification": "classification", "ForTokenClassification": "token-classification"}
    found = [task for name in _architectures(config) for ending, task in endings.items() if name.endswith(ending)]
    return found[0] if found else family if family in TASKS else None


def _pooling(source: ModelSource) -> str:
    path = file_of(source, _POOLING)
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        values = {}
    return "cls" if isinstance(values, dict) and values.get("pooling_mode_cls_token") is True else "mean"


def copy_embedding_files(source: ModelSource, folder: Path) -> None:
    """Copy the files that tell sentence-transformers how a model embeds texts, if the model has them.

    Args:
        source: The model.
        folder: Directory of another model with the same architecture.
    """
    for name in EMBEDDING_FILES:
        path = file_of(source, name)
        if path is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)


def file_of(source: ModelSource, name: str) -> Path | None:
    """Return a file of a model, from its directory or the Hub's cache, or None."""
    if source.kind != "hub":
        path = Path(source.path_or_id) / name
        return path if path.is_file() else None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(source.path_or_id, name, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def weight_files(source: ModelSource) -> list[Path] | None:
    """Return a model's safetensors files, from its directory or the Hub's cache; None if some are missing."""
    whole = file_of(source, WEIGHTS)
    if whole is not None:
        return [whole]
    index = file_of(source, WEIGHT_INDEX)
    if index is None:
        return None
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [file_of(source, name) for name in sorted(names)]
    return [file for file in files if file is not None] if all(files) else None
