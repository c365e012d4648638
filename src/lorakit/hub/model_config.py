"""A model's config, and the facts that it states: the family, the classes of the head, and how texts are embedded."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Literal

from lorakit.architectures.families import depends_on_padding
from lorakit.durable import JsonObject, JsonValue, write_json
from lorakit.errors import ModelError
from lorakit.hub.gguf_files import finish_config
from lorakit.hub.packaged import quiet_transformers
from lorakit.hub.sources import WEIGHT_INDEX, WEIGHTS, ModelSource, call_loader
from lorakit.hub_cache import offline

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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

EMBEDDING_LIST = "modules.json"
"""File in which sentence-transformers lists the modules of a model that embeds texts."""

_POOLING = "1_Pooling"


def config_of(source: ModelSource, values: Mapping[str, JsonValue] | None = None) -> PreTrainedConfig:
    """Return a model's config, with other `values` such as `id2label`, whose keys may be strings.

    Raises:
        ModelError: The config cannot be read.
    """
    import transformers

    with quiet_transformers():
        config = call_loader(source, transformers.AutoConfig.from_pretrained, for_config=True)
    if source.header is not None:
        finish_config(config, source.header)
    for name, value in (values or {}).items():
        setattr(config, name, _by_number(value) if name == "id2label" and isinstance(value, dict) else value)
    return config


def _by_number(table: Mapping[str, JsonValue]) -> dict[int, JsonValue]:
    return {int(key): value for key, value in table.items()}


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model, read once from its config.

    Attributes:
        loader: Key of `TASKS` for the model class that the config names, or None.
        labels: Names of the classes of the head, in order, including those like LABEL_0, which transformers adds.
        label_ids: Their ids in the config, in order; of a valid head, 0 to n-1.
        problem: The config's `problem_type`, or None.
    """

    family: Family
    loader: str | None
    labels: tuple[str, ...]
    label_ids: tuple[int, ...]
    problem: str | None

    @classmethod
    def of(cls, source: ModelSource) -> ModelFacts:
        """Read the facts about a model; a directory saved by sentence-transformers says how it embeds texts.

        Raises:
            ModelError: The config cannot be read.
        """
        config = config_of(source)
        family = _family(config, is_embedding=_embeds(source))
        names = getattr(config, "id2label", None) or {}
        return cls(
            family=family,
            loader=_loader(config, family),
            labels=tuple(str(names[number]) for number in sorted(names)),
            label_ids=tuple(sorted(names)),
            problem=getattr(config, "problem_type", None),
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
    named = [task for name in _architectures(config) for ending, task in endings.items() if name.endswith(ending)]
    return named[0] if named else family if family in TASKS else None


def agree_on_padding(
    source: ModelSource,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    model: PreTrainedModel | None = None,
    head: str = "causal",
) -> int:
    """Choose the id to pad with, and set it in the tokenizers (at least one), and in the config of a loaded model.

    It is the first of these that is in the model's vocabulary and a special token of every tokenizer: the one in the
    model's config, the padding token of a tokenizer, its end token, another special token. An ordinary token is not
    used: a head that reads the last token before the padding would skip it in texts, and tokenizers would not write it.

    Raises:
        ModelError: No token can be used, the head (a key of `TASKS`) reads an id with which rows cannot be padded, or
            the model's outputs depend on padding with any token.
    """
    config = config_of(source) if model is None else model.config
    text = config.get_text_config()
    size, configured = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
    special = set.intersection(*(_special_ids(tokenizer) for tokenizer in tokenizers))
    known = [configured, *(one.pad_token_id for one in tokenizers), *(one.eos_token_id for one in tokenizers)]
    chosen = next((one for one in (*known, *sorted(special)) if one in special and _fits(one, size)), None)
    is_read = head == "classification"
    problem = None
    if depends_on_padding(config.model_type, head):
        message = (
            f"{source.given}: the outputs of a {config.model_type} model for a row depend on the padding after it, and "
            "so on the other rows of its batch; use a model of another type."
        )
        raise ModelError(message, what=config.model_type, where=source.given, field="model")
    if chosen is None:
        problem = "the tokenizer has no special token that is in the model's vocabulary"
    elif is_read and _fits(configured, size) and configured != chosen:
        problem = f"pad_token_id is {configured} in config.json, which is not a special token of the tokenizer"
    elif is_read and config.is_encoder_decoder and chosen == config.eos_token_id:
        problem = f"the head reads the output at the end token (id {chosen}), which is also the padding token"
    if chosen is None or problem is not None:
        raise ModelError(
            f"{source.given}: {problem}, so a row's output would depend on its padding. Set pad_token in "
            "tokenizer_config.json to another special token, and pad_token_id in config.json to its id.",
            what=configured,
            where=source.given,
            field="pad_token_id",
        )
    for tokenizer in tokenizers:
        if tokenizer.pad_token_id != chosen:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    for values in () if model is None else (config, text, getattr(model, "generation_config", None)):
        if values is not None and getattr(values, "pad_token_id", None) != chosen:
            values.pad_token_id = chosen
    return chosen


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def _fits(number: int | None, size: int | None) -> bool:
    return isinstance(number, int) and number >= 0 and (size is None or number < size)


def _embeds(source: ModelSource) -> bool:
    """Return whether a model was saved by sentence-transformers to embed texts."""
    settings = _json_of(source, "config_sentence_transformers.json")
    kind = settings.get("model_type", "SentenceTransformer") if isinstance(settings, dict) else None
    return kind == "SentenceTransformer" and _json_of(source, EMBEDDING_LIST) is not None


def _json_of(source: ModelSource, name: str) -> JsonValue:
    path = file_of(source, name, download=True)
    if path is None:
        return {} if name != EMBEDDING_LIST else None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ModelError(f"{path}: cannot be read as JSON ({cause}).", where=path) from cause


def embedding_folder(source: ModelSource) -> Path | None:
    """Return a local directory with a model's files for sentence-transformers, or None without `modules.json`.

    Raises:
        ModelError: A file cannot be read or downloaded, or `modules.json` names a directory outside the model's.
    """
    modules = _json_of(source, EMBEDDING_LIST)
    if modules is None:
        return None
    paths = module_paths(source, modules)
    if source.kind != "hub":
        return Path(source.path_or_id)
    import huggingface_hub

    wanted = ["*.json", *(f"{path}/*" for path in paths)]
    load = partial(huggingface_hub.snapshot_download, allow_patterns=wanted, ignore_patterns=["*.bin", "*.onnx"])
    found = call_loader(source, lambda name, trust_remote_code, local_files_only, **pinned: load(name, **pinned))
    return Path(found)


def module_paths(source: ModelSource, modules: JsonValue) -> list[str]:
    """Return the directories of the modules in the contents of `modules.json`, except the model's own.

    Raises:
        ModelError: The contents have another form, or a directory is outside the model's.
    """
    known = [one.get("path") for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
    paths = [path for path in known if isinstance(path, str)]
    is_inside = not any(PureWindowsPath(path).anchor or ".." in PureWindowsPath(path).parts for path in paths)
    if not paths or not isinstance(modules, list) or len(paths) != len(modules) or paths[0] or not is_inside:
        text = (
            f"{source.given}: {EMBEDDING_LIST} must list the transformer, whose path is empty, and directories inside "
            "the model's; save the model again with SentenceTransformer.save."
        )
        raise ModelError(text, where=source.given, field=EMBEDDING_LIST)
    return [path for path in paths if path]


def copy_embedding_files(source: ModelSource, folder: Path) -> bool:
    """Copy a model's files for sentence-transformers, settings and modules, if it has any; returns whether it has."""
    original = embedding_folder(source)
    if original is None:
        return False
    for path in module_paths(source, _json_of(source, EMBEDDING_LIST)):
        if (original / path).is_dir():  # published models lack directories without files, such as that of Normalize
            shutil.copytree(original / path, folder / path, dirs_exist_ok=True)
    for file in (original / EMBEDDING_LIST, *original.glob("*sentence_*.json")):
        shutil.copyfile(file, folder / file.name)
    return True


def write_embedding_files(folder: Path, embedding: JsonObject) -> None:
    """Write the files from which sentence-transformers reads how a model that it did not save embeds texts.

    `embedding` is `Target.embedding`, whose only module is the pooling; nothing is written if it is another record.
    """
    modules = embedding.get("modules")
    if not isinstance(modules, list) or len(modules) != 1 or not isinstance(modules[0], dict):
        return
    (folder / _POOLING).mkdir()
    write_json(folder / _POOLING / "config.json", {key: value for key, value in modules[0].items() if key != "type"})
    listed = (("", "Transformer"), (_POOLING, "Pooling"))
    types = [(number, path, f"sentence_transformers.models.{kind}") for number, (path, kind) in enumerate(listed)]
    write_json(
        folder / EMBEDDING_LIST,
        [{"idx": number, "name": str(number), "path": path, "type": kind} for number, path, kind in types],
    )


def file_of(source: ModelSource, name: str, *, download: bool = False) -> Path | None:
    """Return a file of a model, from its directory or the Hub's cache, or None.

    With `download`, a file that is not in the cache is downloaded, unless network access is off.
    """
    if source.kind != "hub":
        path = Path(source.path_or_id) / name
        return path if path.is_file() else None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(source.path_or_id, name, revision=source.revision)
    if cached is None and download and not offline():
        with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
            cached = huggingface_hub.hf_hub_download(source.path_or_id, name, revision=source.revision)
    return Path(cached) if isinstance(cached, str) else None


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


def stored_tensors(files: Iterable[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the names of the tensors in safetensors files -> their dtype there and their shape."""
    from safetensors import safe_open

    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            tensors |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    return tensors
