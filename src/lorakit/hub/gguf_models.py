"""Keep models and tokenizers from GGUF files as plain directories, because reading a GGUF file again takes long.

A directory contains what a loader of transformers reads from the file, in one dtype. It is used only if loading it
gives the same as the file, bit for bit; otherwise, and if the disk has no room for it, the file is read each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.caches import GGUF, remove_unused, versions
from lorakit.durable import JsonObject
from lorakit.errors import DiskError
from lorakit.file_hashes import file_hash
from lorakit.hub.gguf_files import finish_model, finish_tokenizer
from lorakit.hub.model_config import TASKS
from lorakit.hub.packaged import CONVERTED_BY, is_whole, kept_directory, read_manifest, write_weights
from lorakit.hub.sources import ModelSource, call_loader
from lorakit.hub.tokenizer_hashes import tokenizer_hash
from lorakit.terminal import working

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.architectures.shapes import ModelShape

MOST_BYTES = 50 << 30
"""Maximum total size of all directories in bytes."""

TOKENIZER_BYTES = 64 << 20
"""Disk space for a tokenizer, in bytes."""

_COMPARED = (
    "chat_template",
    "model_max_length",
    "truncation_side",
    "padding_side",
    "split_special_tokens",
    "model_input_names",
)


def load_weights(
    source: ModelSource, load: partial[tuple[PreTrainedModel, dict[str, Any]]], config: PreTrainedConfig
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model from a GGUF file, or from the directory that keeps it; returns the result of `load`.

    Args:
        source: Source of the model, a GGUF file.
        load: `from_pretrained` of a class, with its options for the file, which include the dtype.
        config: The model's config, with the caller's changes.

    Raises:
        ModelError: The file cannot be read as a model.
    """
    import torch

    assert source.header is not None
    options = {name: value for name, value in load.keywords.items() if name not in ("config", "quantization_config")}
    wanted = options["dtype"]
    itemsize = wanted.itemsize if isinstance(wanted, torch.dtype) else torch.float32.itemsize
    needed_bytes = sum(source.header.formats.values()) * itemsize

    def plain(folder: Path, dtype: str, config: PreTrainedConfig | None = None) -> Any:
        kept = {**options, "dtype": getattr(torch, dtype), "use_safetensors": True}
        kept |= {} if config is None else {"config": config}
        return call_loader(_directory(source, folder), partial(load.func, **kept))

    def write(folder: Path) -> JsonObject:
        dequantized = {name: value for name, value in load.keywords.items() if name != "config"}
        loaded, report = call_loader(source, partial(load.func, **dequantized))
        finish_model(loaded, Path(source.path_or_id))
        new = set(report["missing_keys"])
        weights = {name: tensor for name, tensor in loaded.state_dict().items() if name not in new}
        write_weights(loaded, folder, weights)
        dtype = str(loaded.dtype).removeprefix("torch.")
        again = plain(folder, dtype)[0].state_dict()
        is_same = again.keys() == loaded.state_dict().keys()
        is_same = is_same and all(_is_same(again[name], tensor) for name, tensor in weights.items())
        return {"dtype": dtype, "is_same": is_same}

    state = torch.get_rng_state()
    kept = _kept(source, load.func.__self__.__name__, str(wanted), needed_bytes, write)  # type: ignore[attr-defined]
    torch.set_rng_state(state)  # new modules get the same values whether or not the model was converted
    return call_loader(source, load) if kept is None else plain(kept, read_manifest(kept)["dtype"], config)


def load_tokenizer(source: ModelSource, load: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Load a tokenizer with `load` from a GGUF file, or from the directory that keeps it.

    Raises:
        ModelError: The file has no tokenizer that transformers can read.
    """
    assert source.header is not None
    header = source.header

    def read() -> PreTrainedTokenizerBase:
        tokenizer = call_loader(source, load)
        finish_tokenizer(tokenizer, header)
        return tokenizer

    def write(folder: Path) -> JsonObject:
        tokenizer = read()
        tokenizer.save_pretrained(str(folder))
        again = call_loader(_directory(source, folder), load)
        return {"is_same": all(facts(again) == facts(tokenizer) for facts in (tokenizer_hash, _settings))}

    kept = _kept(source, "tokenizer", "", TOKENIZER_BYTES, write)
    if kept is None:
        return read()
    tokenizer = call_loader(_directory(source, kept), load)
    tokenizer.name_or_path = str(header.path)
    return tokenizer


def _kept(
    source: ModelSource, loader: str, dtype: str, needed_bytes: int, write: Callable[[Path], JsonObject]
) -> Path | None:
    """Return the directory that keeps what a loader reads, or None if there is none that gives the same."""
    path = Path(source.path_or_id)
    if needed_bytes > MOST_BYTES:
        return None
    what = f"converting {path.name} ({loader})"
    try:
        entry, key = _entry(path, loader, dtype)

        def written(folder: Path) -> JsonObject:
            remove_unused(folder.parent, needed_bytes, MOST_BYTES)
            source.say(f"{what}, which is done once; kept in {folder.parent}")
            return write(folder)

        with working(what):
            folder = kept_directory(entry, key, needed_bytes, written)
    except (DiskError, OSError) as cause:
        source.say(f"{path}: the converted file is not kept for later runs ({str(cause).removesuffix('.')}).")
        return None
    return folder if read_manifest(folder).get("is_same") is True else None


def _entry(path: Path, loader: str, dtype: str) -> tuple[Path, str]:
    """Return the directory for what a loader reads from a file in a dtype, and the key of its cache."""
    key = GGUF.key(source=file_hash(path), loader=loader, dtype=dtype, versions=versions(CONVERTED_BY))
    return GGUF.path() / key, key


def as_kept(shape: ModelShape, source: ModelSource, task: str, dtype: str) -> ModelShape:
    """Return the shape with the source and dtype of the files that keep a GGUF file, or with the size of that file."""
    if source.header is None:
        return shape
    converted = replace(shape, converted_bytes=source.header.size)
    try:
        folder, key = _entry(Path(source.path_or_id), TASKS[task], f"torch.{dtype}")
    except OSError:
        return converted
    is_used = is_whole(folder, key) and read_manifest(folder).get("is_same") is True
    return replace(shape, source=str(folder), dtype=dtype) if is_used else converted


def _directory(source: ModelSource, folder: Path) -> ModelSource:
    return replace(source, kind="directory", path_or_id=str(folder), header=None)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of any shape have the same dtype and bits."""
    import torch

    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _settings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(getattr(tokenizer, name, None)) for name in _COMPARED]
