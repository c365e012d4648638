"""Convert the weights of a model to another dtype in temporary files, so that they need not all be in memory at once.

transformers maps weights that are stored in the wanted dtype, and converts others into memory. Matrices that are
converted in files first are mapped too, and their pages can be given back (`lorakit.mapped_files`). The files have no
names: they disappear with the last tensor that uses them, or with the process.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lorakit.caches import scratch_directory
from lorakit.hub.model_config import file_of, weight_files
from lorakit.hub.packaged import check_space
from lorakit.hub.sources import WEIGHT_INDEX, ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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
    from lorakit.hub.packed_modules import DTYPES  # imports torch

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
