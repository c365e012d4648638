"""Convert a model's files before they are loaded: matrices to another dtype in temporary files, GGUF files in
directories.

transformers maps weights that are stored in the wanted dtype, and converts others into memory. Matrices that are
converted in files first are mapped too, and their pages can be given back (`lorakit.allocator`). The files have no
names: they disappear with the last tensor that uses them, or with the process.

Reading a GGUF file again takes long, so a directory keeps what a loader of transformers reads from it, in one dtype. It
is used only if loading it gives the same as the file, bit for bit; otherwise, and if the disk has no room for it, the
file is read each time.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lorakit.caches import GGUF, remove_unused, scratch_directory, versions
from lorakit.durable import JsonObject
from lorakit.errors import DiskError
from lorakit.file_hashes import file_hash
from lorakit.hub.gguf_files import finish_model, finish_tokenizer
from lorakit.hub.model_config import TASKS, file_of, weight_files
from lorakit.hub.model_files import write_weights
from lorakit.hub.packaged import CONVERTED_BY, check_space, is_whole, kept_directory, read_manifest
from lorakit.hub.sources import WEIGHT_INDEX, ModelSource, call_loader
from lorakit.hub.tokenizer_hashes import tokenizer_hash
from lorakit.terminal import working

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.architectures.shapes import ModelShape

CONVERTED = "F32", "F16", "BF16"
"""Names of the dtypes in safetensors files that are converted into each other."""

BLOCK_BYTES = 16 << 20
"""Number of bytes that are read and converted at a time."""

_SIZE_BYTES = 8  # the size of the header, which is also its alignment
_METADATA = "__metadata__"
_DESCRIPTIONS = "config.json", "generation_config.json", WEIGHT_INDEX


@contextlib.contextmanager
def converted_files(source: ModelSource, dtype: torch.dtype) -> Iterator[Path | None]:
    """Yield a directory for `from_pretrained` with a model's files, whose matrices all have a dtype, in a context.

    Tensors with fewer than two dimensions are not converted, because transformers keeps some in fp32. Yields None if
    there is nothing to convert, if the files are not in the Hub's cache, if the disk has too little space, or if the
    system is not Linux.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = _converted(source, dtype, stack)
        except Exception:  # noqa: BLE001 - whatever is wrong with the files, loading the originals reports it
            folder = None
        yield folder


def has_matrices_in(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Return whether all floating-point matrices of a model have a dtype, so that none was rounded by mistake."""
    tensors = (tensor for tensor in model.state_dict().values() if tensor.ndim > 1 and tensor.is_floating_point())
    return all(tensor.dtype == dtype for tensor in tensors)


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file: its dtype as in the header, and the positions of its bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    def dtype_in(self, target: str) -> str:
        """Return the tensor's dtype after a conversion of all matrices."""
        return target if len(self.shape) > 1 and self.dtype in CONVERTED else self.dtype


@dataclass(frozen=True)
class _File:
    """A safetensors file with its tensors in order, and the position of the first byte after the header."""

    path: Path
    tensors: tuple[_Tensor, ...]
    metadata: Any
    start: int

    @classmethod
    def read(cls, path: Path) -> _File:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(_SIZE_BYTES), "little")
            if size > path.stat().st_size:
                raise ValueError(size)
            header = json.loads(file.read(size))
        metadata = header.pop(_METADATA, None)
        tensors = [_Tensor(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        return cls(path, tuple(sorted(tensors, key=lambda tensor: tensor.first)), metadata, _SIZE_BYTES + size)

    def is_in(self, target: str) -> bool:
        """Return whether all matrices have a dtype."""
        return all(tensor.dtype_in(target) == tensor.dtype for tensor in self.tensors)

    def header(self, target: str) -> tuple[bytes, int]:
        """Return the first bytes of the file after the conversion, and the size of all that follow."""
        entries, end = {} if self.metadata is None else {_METADATA: self.metadata}, 0
        for tensor in self.tensors:
            dtype, size = tensor.dtype_in(target), tensor.last - tensor.first
            if dtype != tensor.dtype:
                size = size // _torch_dtype(tensor.dtype).itemsize * _torch_dtype(dtype).itemsize
            entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (end, end + size)}
            end += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % _SIZE_BYTES)
        return len(text).to_bytes(_SIZE_BYTES, "little") + text, end

    def write_converted(self, target: str, file: IO[bytes]) -> None:
        """Write the file after the conversion."""
        import torch

        file.write(self.header(target)[0])
        with self.path.open("rb") as original:
            for tensor in self.tensors:
                original.seek(self.start + tensor.first)
                for position in range(tensor.first, tensor.last, BLOCK_BYTES):
                    block = original.read(min(BLOCK_BYTES, tensor.last - position))
                    if tensor.dtype_in(target) != tensor.dtype:
                        values = torch.frombuffer(bytearray(block), dtype=_torch_dtype(tensor.dtype))
                        block = values.to(_torch_dtype(target)).view(torch.uint8).numpy().tobytes()
                    file.write(block)
        file.flush()


def _torch_dtype(stored: str) -> torch.dtype:
    from lorakit.hub.loader_extensions import DTYPES  # imports torch

    return DTYPES[stored]


def _converted(source: ModelSource, dtype: torch.dtype, stack: contextlib.ExitStack) -> Path | None:
    target = next((stored for stored in CONVERTED if _torch_dtype(stored) == dtype), None)
    paths = weight_files(source)
    if target is None or paths is None or sys.platform != "linux":
        return None
    files = [_File.read(path) for path in paths]
    others = [file for file in files if not file.is_in(target)]
    if not others:
        return None
    cache = scratch_directory()  # not /tmp, which may be in memory
    cache.mkdir(parents=True, exist_ok=True)
    check_space(cache, sum(file.header(target)[1] for file in others))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    descriptions = [path for path in (file_of(source, name) for name in _DESCRIPTIONS) if path is not None]
    links = {path.name: path.absolute() for path in (*descriptions, *paths)}
    for file in others:
        unnamed = tempfile.TemporaryFile(dir=cache)  # noqa: SIM115 - `stack` closes it
        stack.callback(unnamed.close)
        file.write_converted(target, unnamed)
        links[file.path.name] = Path(f"/proc/self/fd/{unnamed.fileno()}")
    for name, path in links.items():
        (folder / name).symlink_to(path)
    return folder


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
