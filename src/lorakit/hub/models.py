"""Loading models and tokenizers: safetensors only, no code from a model's folder, nothing left at random.

Knows nothing of adapters; what is loaded is the user's model, in eval mode. How a base is stored in fewer bits is
`quantising`'s business.

Writing a model as a plain directory that `from_pretrained` of any program loads.

The base that an adapter's config names, loaded by transformers as the caller's options say.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError, DiskError, ModelError
from lorakit.hub.quantizing import loading_options, refuse_twice, require_quantiser, settle, words_of_files
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
"""What a model is loaded for, and the class of transformers that does it."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What `load_model` takes as a dtype; "auto" keeps the file's."""

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
        model: What `resolve` takes, or what it gave.
        dtype: "auto" (as in the file), a name of `DTYPES`, or a torch dtype; of a quantised model that of its
            products and of what is not quantised.
        device: Where the weights go.
        task: A key of `TASKS`. For "classification" a head that the file lacks is made fresh.
        quantization: Store the linear layers in fewer bits: a `Quantization`, or its name.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: No such dtype, task or quantisation, or the files are quantised already.
        ModelError: There is no such model, it has no safetensors weights, a file is damaged, weights are missing, or
            it cannot be quantised so.
        MissingExtra: The quantiser's package is not installed.
    """
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}; allowed: {', '.join(TASKS)}.", what=task, field="task", allowed=TASKS)
    stored = Quantization(quantization) if isinstance(quantization, str) else quantization
    if stored is not None:
        require_quantiser(stored)
    wanted = _dtype(dtype)
    source = model if isinstance(model, ModelSource) else resolve(model)
    require(source)
    import transformers

    with quiet_transformers(bars=source.kind == "hub"):
        config = call_loader(source, transformers.AutoConfig.from_pretrained)
        options: dict[str, Any] = {"device_map": {"": device}} if refuse_twice(config, stored, source) else {}
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
        settle(loaded, stored, source)
    return loaded.eval()


def stored_as_files(
    model: str | os.PathLike[str] | ModelSource, wanted: Quantization | None = None
) -> Quantization | None:
    """How a loaded model will be stored: as was asked for, or as its files are; no weight is loaded.

    Args:
        model: What `resolve` takes, or what it gave.
        wanted: What was asked for, or None.

    Returns:
        The quantisation; None where it is plain, or quantised in a way that has no word.

    Raises:
        ConfigError: The files are quantised already, and a quantisation was asked for.
        ModelError: There is no such model.
    """
    source = model if isinstance(model, ModelSource) else resolve(model)
    import transformers

    with quiet_transformers():
        config = call_loader(source, transformers.AutoConfig.from_pretrained)
    return words_of_files(config) if refuse_twice(config, wanted, source) else wanted


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
    """Call a loader of transformers; whatever it raises comes out as one sentence."""
    try:
        return load(source.path_or_id, trust_remote_code=False, local_files_only=source.kind != "hub", **options)
    except Exception as cause:  # loaders of foreign files raise what they like
        if _brings_own_code(cause):
            reason = "it brings its own Python code, and code from a model's folder is never run"
        else:
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:240]}"
        raise ModelError(f"{source.given}: the model cannot be loaded ({reason}).", where=source.given) from cause


def _brings_own_code(cause: Exception) -> bool:
    """Return whether transformers refused to load a model because its code would have to be run.

    The only place that reads transformers' text: it raises a plain ValueError without attributes, and a model that has
    code of its own may also load without it, so that its config does not tell.
    """
    return isinstance(cause, ValueError) and "trust_remote_code" in str(cause)


def _check_report(source: ModelSource, report: dict[str, Any], task: str) -> None:
    """Refuse weights that transformers would leave at random, which it only warns of."""
    missing = sorted(str(name) for name in report.get("missing_keys", ()))
    if missing and task not in _FRESH_HEADS:
        raise ModelError(
            f"{source.given}: the files lack {len(missing)} weights of the model, such as {missing[0]}; they would be "
            f"random. Is it a model for the task '{task}'?",
            what=missing[0],
            where=source.given,
        )


def save_model(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write safetensors, config, generation config and tokenizer.

    Args:
        model: A transformers model without adapters.
        folder: An existing, empty directory.
        tokenizer: A transformers tokenizer, or None.

    Raises:
        DiskError: There is no room, or the disk refuses.
        ModelError: transformers does not write this model.
    """
    from safetensors import SafetensorError

    needed_bytes = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{folder.parent}: {format_bytes(needed_bytes)} are needed and {format_bytes(free_bytes)} are free.",
            where=folder.parent,
        )
    with quiet_transformers():
        try:
            model.save_pretrained(str(folder))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
        except (OSError, SafetensorError) as cause:  # a full disk comes out of the writer of safetensors as the latter
            raise DiskError(
                f"{folder.parent}: the model cannot be written ({' '.join(str(cause).split())}).", where=folder.parent
            ) from cause
        except Exception as cause:  # what a model's own code raises
            raise ModelError(
                f"transformers does not write this {type(model).__name__} ({' '.join(str(cause).split())[:240]})."
            ) from cause
    readable = (folder / "config.json").stat().st_mode
    for part in folder.glob("*.safetensors"):
        part.chmod(readable)  # the writer of safetensors makes them private, whatever the umask says


CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task of an adapter -> class of transformers that loads its base."""


def load_base(
    name: str,
    *,
    task: str | None,
    written_class: tuple[str, str],
    tokenizer_folder: Path,
    options: Mapping[str, Any],
) -> Any:
    """Load the base of an adapter; it grows with a tokenizer that lies beside the adapter.

    Args:
        name: Folder or hub id of the base.
        task: The adapter's task, a key of `CLASSES`, or None for the class that the config names.
        written_class: Package and class that the config names; the caller has checked the package.
        tokenizer_folder: The adapter's folder.
        options: What transformers' `from_pretrained` takes.

    Raises:
        ModelError: There is no such class.
    """
    import transformers

    library = transformers if task else import_module(written_class[0])
    kind = getattr(library, CLASSES[task] if task else written_class[1], None)
    if kind is None:
        raise ModelError(f"{'.'.join(written_class)}: there is no such class, so the base {name} cannot be loaded.")
    model = kind.from_pretrained(name, **options)
    if (tokenizer_folder / "tokenizer_config.json").exists() and hasattr(model, "get_input_embeddings"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    return model
