"""Load and save models: safetensors only, no code from a model's directory, no weights left at random.

Models are loaded in eval mode. `quantizing` handles quantized bases. `save_model` writes a directory that
`from_pretrained` loads; `load_base` loads the base that an adapter's config names, with the caller's options.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError, DiskError, ModelError
from lorakit.hub.quantizing import (
    check_quantized_once,
    finish_loading,
    loading_options,
    quantization_of_files,
    require_quantizer,
)
from lorakit.hub.quiet import quiet_transformers
from lorakit.hub.sources import ModelSource, require, resolve
from lorakit.plan.quantized import Quantization
from lorakit.tables import format_bytes

if TYPE_CHECKING:
    import torch


TASKS = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}
"""Task -> transformers class that loads its model."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtype names of `load_model`; "auto" keeps the file's dtype."""

_FRESH_HEADS = frozenset({"classification"})


def load_model(
    model: str | os.PathLike[str] | ModelSource,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    task: str = "causal",
    quantization: str | Quantization | None = None,
) -> Any:
    """Load a model with its weights.

    Args:
        model: Argument or result of `resolve`.
        dtype: "auto" (as in the file), a name of `DTYPES`, or a torch dtype; for a quantized model, the compute dtype
            and the dtype of weights that are not quantized.
        device: Device of the weights.
        task: A key of `TASKS`. For "classification", a head that is missing in the files is initialized.
        quantization: Quantize the linear layers: a `Quantization`, or its name.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: Unknown dtype, task or quantization, or the files are quantized already.
        ModelError: The model was not found, has no safetensors weights, is damaged or incomplete, or does not support
            this quantization.
        MissingExtra: The quantization package is not installed.
    """
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}; allowed: {', '.join(TASKS)}.", what=task, field="task", allowed=TASKS)
    stored = Quantization(quantization) if isinstance(quantization, str) else quantization
    if stored is not None:
        require_quantizer(stored)
    wanted = _dtype(dtype)
    source = model if isinstance(model, ModelSource) else resolve(model)
    require(source)
    import transformers

    with quiet_transformers(bars=source.kind == "hub"):
        config = call_loader(source, transformers.AutoConfig.from_pretrained)
        options: dict[str, Any] = {"device_map": {"": device}} if check_quantized_once(config, stored, source) else {}
        if stored is not None:
            wanted = (config.dtype or _dtype("float32")) if wanted == "auto" else wanted
            options = loading_options(stored, wanted, device)
        loaded, report = call_loader(
            source,
            getattr(transformers, TASKS[task]).from_pretrained,
            dtype=wanted,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        _check_report(source, report, task)
        if "device_map" not in options:
            loaded = loaded.to(device)
        finish_loading(loaded, stored, source)
    return loaded.eval()


def stored_as_files(
    model: str | os.PathLike[str] | ModelSource, wanted: Quantization | None = None
) -> Quantization | None:
    """Return how a loaded model will be quantized: as requested, or as in its files; loads no weights.

    Args:
        model: Argument or result of `resolve`.
        wanted: The requested quantization, or None.

    Returns:
        The quantization; None if the model is not quantized, or its quantization has no name here.

    Raises:
        ConfigError: The files are quantized already, and a quantization was requested.
        ModelError: The model was not found.
    """
    source = model if isinstance(model, ModelSource) else resolve(model)
    import transformers

    with quiet_transformers():
        config = call_loader(source, transformers.AutoConfig.from_pretrained)
    return quantization_of_files(config) if check_quantized_once(config, wanted, source) else wanted


def _dtype(dtype: str | torch.dtype) -> Any:
    import torch

    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.", what=dtype, field="dtype", allowed=DTYPES
        )
    return getattr(torch, dtype)


def call_loader(source: ModelSource, load: Any, **options: Any) -> Any:
    """Call a loader of transformers; a model's own code is never run.

    Args:
        source: The model.
        load: The loader, such as `AutoModelForCausalLM.from_pretrained`.
        options: Its options.

    Raises:
        ModelError: The loader raised an exception; the message has one line.
    """
    try:
        return load(source.path_or_id, trust_remote_code=False, local_files_only=source.kind != "hub", **options)
    except Exception as cause:  # loaders of third-party files may raise anything
        if _brings_own_code(cause):
            reason = "it requires its own Python code, and code from a model's directory is never run"
        else:
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:240]}"
        raise ModelError(f"{source.given}: the model cannot be loaded ({reason}).", where=source.given) from cause


def _brings_own_code(cause: Exception) -> bool:
    """Return whether transformers rejected a model because its code would have to be run.

    This is the only function that reads transformers' text: it raises a plain ValueError without attributes, and
    the config does not tell, because a model with its own code may also load without it.
    """
    return isinstance(cause, ValueError) and "trust_remote_code" in str(cause)


def _check_report(source: ModelSource, report: dict[str, Any], task: str) -> None:
    """Reject missing weights, which transformers initializes at random with only a warning."""
    missing = sorted(str(name) for name in report.get("missing_keys", ()))
    if missing and task not in _FRESH_HEADS:
        raise ModelError(
            f"{source.given}: {len(missing)} weights of the model are missing in the files, such as {missing[0]}; they "
            f"would be random. Check that it is a model for the task '{task}'.",
            what=missing[0],
            where=source.given,
        )


def save_model(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write weights (safetensors), config, generation config and tokenizer.

    Args:
        model: A transformers model without adapters.
        folder: An existing, empty directory.
        tokenizer: A transformers tokenizer, or None.

    Raises:
        DiskError: The disk is full, or writing failed.
        ModelError: transformers cannot save this model.
    """
    from safetensors import SafetensorError

    needed_bytes = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{folder.parent}: {format_bytes(needed_bytes)} needed, {format_bytes(free_bytes)} free; free some space.",
            where=folder.parent,
        )
    with quiet_transformers():
        try:
            model.save_pretrained(str(folder))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
        except (OSError, SafetensorError) as cause:  # safetensors raises the latter on a full disk
            raise DiskError(
                f"{folder.parent}: the model cannot be written ({' '.join(str(cause).split())}).", where=folder.parent
            ) from cause
        except Exception as cause:  # custom code of a model may raise anything
            raise ModelError(
                f"transformers cannot save this {type(model).__name__} ({' '.join(str(cause).split())[:240]})."
            ) from cause
    readable = (folder / "config.json").stat().st_mode
    for part in folder.glob("*.safetensors"):
        part.chmod(readable)  # safetensors makes them private, regardless of the umask


CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task of an adapter -> transformers class that loads its base."""


def load_base(
    name: str,
    *,
    task: str | None,
    written_class: tuple[str, str],
    tokenizer_folder: Path,
    options: Mapping[str, Any],
) -> Any:
    """Load the base of an adapter; its embeddings are resized for a tokenizer saved with the adapter.

    Args:
        name: Directory or Hub id of the base.
        task: The adapter's task, a key of `CLASSES`, or None for the class that the config names.
        written_class: Package and class from the config; the caller has checked the package.
        tokenizer_folder: The adapter's directory.
        options: Options of transformers' `from_pretrained`.

    Raises:
        ModelError: The class was not found.
    """
    import transformers

    library = transformers if task else import_module(written_class[0])
    kind = getattr(library, CLASSES[task] if task else written_class[1], None)
    if kind is None:
        raise ModelError(f"class {'.'.join(written_class)} not found, so the base {name} cannot be loaded.")
    model = kind.from_pretrained(name, **options)
    if (tokenizer_folder / "tokenizer_config.json").exists() and hasattr(model, "get_input_embeddings"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    return model
