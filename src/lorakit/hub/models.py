"""Load and save models and tokenizers: safetensors only, no code from a model's directory, no random weights.

Models are loaded in eval mode. `load_base` loads the base named in an adapter's config, with the caller's options.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.choices import DTYPES
from lorakit.durable import JsonValue, read_bytes
from lorakit.errors import ConfigError, DiskError, ModelError
from lorakit.hub import gguf_files
from lorakit.hub.converting import converted_files, has_matrices_in, load_weights
from lorakit.hub.converting import load_tokenizer as load_gguf_tokenizer
from lorakit.hub.model_config import TASKS, WITH_NEW_HEADS, config_of
from lorakit.hub.model_files import write_weights
from lorakit.hub.packaged import PACKAGED, check_space, quiet_imports, quiet_transformers
from lorakit.hub.quantization_keys import check_described
from lorakit.hub.quantizing import (
    check_quantized_once,
    finish_loading,
    loading_options,
    options_for_files,
    quantization_of_files,
    require_quantizer,
)
from lorakit.hub.shapes import full_modules, is_unused_pooler, modules_with, quantization_values, skeleton
from lorakit.hub.sources import ModelSource, base_named, call_loader, require, resolve
from lorakit.hub_cache import TOKENIZER_FILES
from lorakit.plan.quantized import Quantization
from lorakit.terminal import working

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MOST_TOKENIZER_BYTES = 256 << 20
"""Maximum size of a tokenizer's file that is copied."""


def load_model(
    model: str | os.PathLike[str] | ModelSource,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    task: str = "causal",
    quantization: str | Quantization | None = None,
    convert_in_files: bool = False,
) -> PreTrainedModel:
    """Load a model with its weights, in eval mode.

    Args:
        model: A model name or path, or the result of `resolve`.
        dtype: "auto" (as in the files), another name in `DTYPES`, or a torch dtype; for a quantized model, the compute
            dtype and the dtype of the weights that are not quantized.
        device: Device for the weights.
        task: A key of `TASKS`. For "classification", a head that is missing from the files is newly initialized.
        quantization: Quantization of the linear layers: a `Quantization`, its name, or None. The weights of a GGUF file
            are dequantized and cannot be quantized again.
        convert_in_files: Whether weights of another dtype are converted in temporary files in lorakit's cache, and
            mapped, so that they can be replaced one after another. The values are the same. Only on Linux, and only
            with enough disk space.

    Raises:
        ConfigError: The dtype, task or quantization is unknown, or the files are already quantized and a quantization
            was requested.
        ModelError: The model was not found, has no safetensors weights, is damaged or incomplete, or does not support
            the requested quantization.
        MissingExtra: The quantization package is not installed.
    """
    return load_for_task(model, LoadOptions(dtype, device, quantization, convert_in_files), task).model


@dataclass(frozen=True)
class LoadOptions:
    """Options of `load_model`, which describes them, except for the model and the task."""

    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "cpu"
    quantization: str | Quantization | None = None
    convert_in_files: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and the paths of modules with random weights, such as a new classification head."""

    model: PreTrainedModel
    new_modules: tuple[str, ...]


def load_for_task(
    model: str | os.PathLike[str] | ModelSource,
    how: LoadOptions | None = None,
    task: str = "causal",
    config_values: Mapping[str, JsonValue] | None = None,
) -> LoadedModel:
    """Load a model with its weights and, if the task needs one, a head that the files do not contain.

    Args:
        model: A model name or path, or the result of `resolve`.
        how: Dtype, device and quantization; None for the defaults.
        task: A key of `TASKS`. A head for classification that is missing from the files, or has another size, is
            initialized with torch's random number generator.
        config_values: Values of the model's config to replace, such as `id2label`.

    Raises:
        LorakitError: See `load_model`.
    """
    how = LoadOptions() if how is None else how
    quantization, device = how.quantization, how.device
    if task not in TASKS:
        raise ConfigError.of("task", task, allowed=TASKS)
    stored = Quantization(quantization) if isinstance(quantization, str) else quantization
    if stored is not None:
        require_quantizer(stored)
    wanted = _dtype(how.dtype)
    source = resolve(model)
    require(source)
    import torch
    import transformers

    with quiet_transformers(bars=source.kind == "hub"), working(f"loading {source.given}"):
        config = config_of(source, config_values)
        options = options_for_files(config, stored, source, device)
        unquantized: tuple[str, ...] = ()
        if stored is not None:
            wanted = wanted if isinstance(wanted, torch.dtype) else config.dtype or torch.float32
            if task != "causal":
                unquantized = full_modules(skeleton(source, task, config_values), source, task)
            options = loading_options(stored, wanted, device, unquantized)
        options |= {"dtype": wanted, "output_loading_info": True}
        options |= {"use_safetensors": True} if source.header is None else gguf_files.dequantizing_options()
        if config_values:
            options |= {"config": config, "ignore_mismatched_sizes": task in WITH_NEW_HEADS}
        load = partial(getattr(transformers, TASKS[task]).from_pretrained, **options)
        converted = _load_converted(source, load, config) if how.convert_in_files and stored is None else None
        if converted is None:
            converted = call_loader(source, load) if source.header is None else load_weights(source, load, config)
        loaded, report = converted
        if not quantization_values(config):
            check_described(map(str, report.get("unexpected_keys", ())))
        new = _new_modules(loaded, source, report, task)
        if source.header is not None:
            gguf_files.finish_model(loaded, source.header.path)
        if "device_map" not in options:
            loaded = loaded.to(device)
        finish_loading(loaded, stored, source, unquantized)
    return LoadedModel(loaded.eval(), new)


def _load_converted(
    source: ModelSource, load: partial[tuple[PreTrainedModel, dict[str, Any]]], config: PreTrainedConfig
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """Return the result of a loader for files that were converted to its dtype, or None if it needs the originals."""
    import torch

    dtype, state = load.keywords["dtype"], torch.get_rng_state()
    if not isinstance(dtype, torch.dtype):
        return None
    with converted_files(source, dtype) as folder:
        if folder is None:
            return None
        here = replace(source, kind="directory", path_or_id=str(folder), revision=None)
        with contextlib.suppress(ModelError):
            loaded, report = call_loader(here, partial(load, config=config))
            if has_matrices_in(loaded, dtype):
                loaded.name_or_path = loaded.config.name_or_path = source.path_or_id
                return loaded, report
    torch.set_rng_state(state)  # new modules get the same values as without this attempt
    return None


def stored_as_files(
    model: str | os.PathLike[str] | ModelSource, wanted: Quantization | None = None
) -> Quantization | None:
    """Return the quantization of a model once it is loaded, or None if dense or in a format without a name.

    Raises:
        ConfigError: The files are already quantized, and a quantization was requested.
        ModelError: The model was not found.
    """
    source = resolve(model)
    config = config_of(source)
    return quantization_of_files(config) if check_quantized_once(config, wanted, source) else wanted


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Convert a dtype name to a torch dtype; return "auto" and torch dtypes unchanged."""
    import torch

    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ConfigError.of("dtype", dtype, allowed=DTYPES)
    return getattr(torch, dtype)


def _new_modules(model: PreTrainedModel, source: ModelSource, report: dict[str, Any], task: str) -> tuple[str, ...]:
    """Return the paths of modules without weights in the files, which transformers initializes randomly.

    Raises:
        ModelError: The task does not need new modules, so the files are incomplete or are those of another model.
    """
    resized = (name for name, *_ in report.get("mismatched_keys", ()))
    missing = {str(name) for name in (*report.get("missing_keys", ()), *resized)}
    if is_unused_pooler(task, missing):
        model.pooler = None
        return ()
    if missing and task not in WITH_NEW_HEADS:
        raise source.error(
            f"weights are missing from the files ({len(missing)} in total, for example {min(missing)}) and would be "
            f"initialized randomly. Check that this is a model for the task '{task}'."
        )
    return modules_with(model, missing)


def save_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a model's weights (safetensors), config, generation config and tokenizer, if any, to an empty directory.

    Raises:
        DiskError: The disk is full, or writing failed.
        ModelError: transformers cannot save this model.
    """
    needed_bytes = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    check_space(folder.parent, needed_bytes)
    with quiet_transformers():
        try:
            write_weights(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
        except Exception as cause:  # a model's custom code may raise anything
            reason = " ".join(str(cause).split())[:240]
            if isinstance(cause, OSError):
                message = f"{folder.parent}: the model cannot be written ({reason})."
                raise DiskError(message, where=folder.parent) from cause
            text = f"transformers cannot save this {type(model).__name__} ({reason})."
            raise ModelError(text, what=type(model).__name__) from cause


CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""An adapter's task -> transformers class that loads its base."""


def load_base(
    name: str, *, task: str | None, written_class: tuple[str, str], tokenizer_folder: Path, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Load an adapter's base, and enlarge its embeddings if the tokenizer saved with the adapter needs more rows.

    Args:
        name: Directory, GGUF file or Hub id of the base.
        task: The adapter's task, a key of `CLASSES`, or None to use `written_class`.
        written_class: Package and class given in the adapter's config; the caller has already checked the package.
        tokenizer_folder: The adapter's directory, which may contain a tokenizer.
        options: Keyword arguments for transformers' `from_pretrained`.

    Raises:
        ModelError: The base's class was not found.
    """
    import transformers

    name = base_named(name, folder=tokenizer_folder) or name
    if name in PACKAGED:  # whose directory in the cache may be missing here
        name = resolve(name).path_or_id
    library = transformers if task else import_module(written_class[0])
    with quiet_imports():
        kind = getattr(library, CLASSES[task] if task else written_class[1], None)
        if kind is None:
            text = f"class {'.'.join(written_class)} not found, so the base {name} cannot be loaded."
            raise ModelError(text, where=name)
        if name.endswith(gguf_files.SUFFIX) and Path(name).is_file():
            source = resolve(name)
            model = call_loader(source, partial(kind.from_pretrained, **options, **gguf_files.dequantizing_options()))
            gguf_files.finish_model(model, Path(name))
        else:
            model = kind.from_pretrained(name, **options)
    if (tokenizer_folder / "tokenizer_config.json").exists() and hasattr(model, "get_input_embeddings"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    return model


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in a directory whose names match `TOKENIZER_FILES`."""
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def tokenizer_contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files in a directory, by name."""
    return {path.name: read_bytes(path, MOST_TOKENIZER_BYTES) for path in tokenizer_files(folder)}


def adapter_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that was saved in an adapter's directory, or None; a ModelError if it is damaged."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return load_tokenizer(ModelSource("directory", str(folder), str(folder), str(folder), str(folder)))


def load_tokenizer(model: str | os.PathLike[str] | ModelSource) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ModelError: The model was not found, or its tokenizer is missing or cannot be read.
    """
    source = resolve(model)
    require(source, weights=False, tokenizer=True)
    import transformers

    load = transformers.AutoTokenizer.from_pretrained
    with quiet_transformers(bars=source.kind == "hub"), working(f"loading {source.given}"):
        tokenizer = call_loader(source, load) if source.header is None else load_gguf_tokenizer(source, load)
    if source.kind == "packaged":
        tokenizer.name_or_path = source.given  # messages name the model, not its directory in the cache
    return tokenizer


@dataclass(frozen=True)
class AddedTokens:
    """Tokens added to a tokenizer.

    Attributes:
        pieces: New id -> ids of the tokens that previously encoded the same text, in order, omitting the unknown token.
        vocabulary: Largest id in the tokenizer plus 1.
    """

    ids: dict[str, int]
    pieces: dict[int, tuple[int, ...]]
    vocabulary: int


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> AddedTokens:
    """Add tokens (without duplicates) to a tokenizer; each matches its literal text everywhere and decodes to it.

    Raises:
        ConfigError: The tokenizer already has one of the tokens.
        ModelError: The tokenizer does not support adding tokens.
    """
    known = _vocabulary(tokenizer)
    written = {token: tuple(tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]) for token in tokens}
    for token in tokens:
        number = known.get(token)
        if number is None and len(written[token]) == 1 and tokenizer.decode(list(written[token])) == token:
            number = written[token][0]
        if number is not None:
            text = (
                f"new_tokens contains {token!r}, which the tokenizer already has (id {number}). Leave that token out."
            )
            raise ConfigError(text, what=token, field="new_tokens")
    from tokenizers import AddedToken

    try:
        count = tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    except NotImplementedError as cause:
        raise _no_vocabulary(tokenizer) from cause
    after = _vocabulary(tokenizer)
    ids = {token: after[token] for token in tokens if token in after and token not in known}
    if count != len(tokens) or len(set(ids.values())) < len(tokens):
        raise _no_vocabulary(tokenizer)
    unknown = tokenizer.unk_token_id
    pieces = {ids[token]: tuple(i for i in written[token] if i != unknown) for token in tokens}
    return AddedTokens(ids, pieces, 1 + max(after.values()))


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    try:
        return dict(tokenizer.get_vocab())
    except (AttributeError, NotImplementedError) as cause:
        raise _no_vocabulary(tokenizer) from cause


def _no_vocabulary(tokenizer: PreTrainedTokenizerBase) -> ModelError:
    return ModelError(
        f"new_tokens: this {type(tokenizer).__name__} does not support adding tokens. Use a base with a tokenizer that "
        "does, or leave new_tokens out.",
        field="new_tokens",
    )
