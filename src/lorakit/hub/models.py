"""Loading models and tokenizers: safetensors only, no code from a model's folder, nothing left at random.

Knows nothing of adapters; what is loaded is the user's model, in eval mode. How a base is stored in fewer bits is
`quantising`'s business.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError, ModelError
from lorakit.hub.quantising import loading_options, refuse_twice, require_quantiser, settle, words_of_files
from lorakit.hub.quiet import quiet_transformers
from lorakit.hub.sources import ModelSource, require, resolve
from lorakit.plan.quantised import Quantization

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
        raise ConfigError(f"task is {task!r}; allowed: {', '.join(TASKS)}.")
    stored = Quantization(quantization) if isinstance(quantization, str) else quantization
    if stored is not None:
        require_quantiser(stored)
    wanted = _dtype(dtype)
    source = model if isinstance(model, ModelSource) else resolve(model)
    require(source)
    import transformers

    with quiet_transformers(bars=source.kind == "hub"):
        config = _call(source, transformers.AutoConfig.from_pretrained)
        options: dict[str, Any] = {"device_map": {"": device}} if refuse_twice(config, stored, source) else {}
        if stored is not None:
            wanted = (config.dtype or _dtype("float32")) if wanted == "auto" else wanted
            options = loading_options(stored, wanted, device)
        loaded, report = _call(
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
        config = _call(source, transformers.AutoConfig.from_pretrained)
    return words_of_files(config) if refuse_twice(config, wanted, source) else wanted


def load_tokenizer(model: str | os.PathLike[str] | ModelSource) -> Any:
    """Load the tokenizer of a model.

    Args:
        model: What `resolve` takes, or what it gave.

    Returns:
        A transformers tokenizer.

    Raises:
        ModelError: There is no such model, it has no tokenizer, or the tokenizer cannot be read.
    """
    source = model if isinstance(model, ModelSource) else resolve(model)
    require(source, weights=False, tokenizer=True)
    import transformers

    with quiet_transformers(bars=source.kind == "hub"):
        return _call(source, transformers.AutoTokenizer.from_pretrained)


def _dtype(dtype: str | torch.dtype) -> Any:
    import torch

    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    return getattr(torch, dtype)


def _call(source: ModelSource, load: Any, **options: Any) -> Any:
    """Call a loader of transformers; whatever it raises comes out as one sentence."""
    try:
        return load(source.path_or_id, trust_remote_code=False, local_files_only=source.kind != "hub", **options)
    except Exception as cause:  # loaders of foreign files raise what they like
        if "trust_remote_code" in str(cause):
            reason = "it brings its own Python code, and code from a model's folder is never run"
        else:
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:240]}"
        raise ModelError(f"{source.given}: the model cannot be loaded ({reason}).") from cause


def _check_report(source: ModelSource, report: dict[str, Any], task: str) -> None:
    """Refuse weights that transformers would leave at random, which it only warns of."""
    missing = sorted(str(name) for name in report.get("missing_keys", ()))
    if missing and task not in _FRESH_HEADS:
        raise ModelError(
            f"{source.given}: the files lack {len(missing)} weights of the model, such as {missing[0]}; they would be "
            f"random. Is it a model for the task '{task}'?"
        )
