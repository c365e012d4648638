"""An adapter's tensors on disk: their names, which are PEFT's (`base_model.model.` + path + ending), and their file.

Files are checked completely before tensors are created (`lorakit.tensor_headers`), and are never memory-mapped, so that
later changes have no effect.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import safetensors.torch
from torch import Tensor, nn

from lorakit.core.kinds import Kind
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.model.index import INSIDE, AdapterIndex
from lorakit.core.model.target_weights import paths_on_disk
from lorakit.core.variants import Variant, own_tensors
from lorakit.durable import read_bytes, sha256_bytes
from lorakit.tensor_headers import ENDINGS, MAX_FILE_BYTES, PREFIX, parse_header

T = TypeVar("T")


class Key(NamedTuple):
    """A parsed tensor name; `part` is "A", "B", "bias", or the `held_as` name of one of the variant's extra tensors."""

    path: str
    part: str


def parse(name: str) -> Key | None:
    """Parse a tensor name; return None if the tensor does not belong to a site."""
    if not name.startswith(PREFIX):
        return None
    rest = name.removeprefix(PREFIX)
    extras = ((f".{name}", t.held_as) for t in own_tensors() for name in (t.held_as, *t.older_names))
    for ending, part in (*ENDINGS.items(), *extras):
        if rest.endswith(ending):
            return Key(rest.removesuffix(ending), part)
    return None


def by_site(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Group values by site path and then by part, ignoring tensors that do not belong to a site."""
    sites: dict[str, dict[str, T]] = {}
    for name, value in named.items():
        key = parse(name)
        if key is not None:
            sites.setdefault(key.path, {})[key.part] = value
    return sites


def endings_of(kind: Kind) -> tuple[str, str]:
    """Return the endings of the tensor names for A and B at sites of the given kind."""
    return f".{kind.names[0]}{kind.on_disk}", f".{kind.names[1]}{kind.on_disk}"


def part_names(kind: Kind, variant: Variant) -> dict[str, str]:
    """Return a dict from each `Key.part` of a site to the tensor's name relative to the site's path."""
    A, B = kind.names
    extras = {tensor.held_as: tensor.held_as for tensor in variant.parts.extras}
    return {"A": A + kind.on_disk, "B": B + kind.on_disk, "bias": f"{B}.bias", **extras}


def adapter_tensors(model: nn.Module | AdapterIndex, adapter: str) -> dict[str, Tensor]:
    """Return all tensors (…) that an adapter trains, not copied, keyed by and sorted by name on disk."""
    index = AdapterIndex.of(model)
    tensors: dict[str, Tensor] = {}
    on_disk = paths_on_disk(index, adapter)
    depths = Counter(plain_path(path) for path in on_disk.values())
    for path, part in index.with_biases():
        where = inside(plain_path(path), depths) if isinstance(part, BiasPatch) else on_disk.get(path, path)
        tensors |= {f"{PREFIX}{where}.{key}": tensor for key, tensor in part.saved_tensors(adapter).items()}
    return dict(sorted(tensors.items()))


def inside(path: str, depths: Mapping[str, int]) -> str:
    """Convert a path in the plain base to PEFT's form, which adds `.base_layer` for each layer that wraps a module."""
    words, where = path.split("."), ""
    for end, word in enumerate(words, 1):
        where += ("." if where else "") + word + INSIDE * depths.get(".".join(words[:end]), 0)
    return where


def plain_path(path: str) -> str:
    """Convert a path in an adapted model to the corresponding path in the plain base."""
    return ".".join(word for word in path.split(".") if word not in {"base_layer", "original_module", "token_adapter"})


@dataclass(frozen=True)
class TensorFile:
    """The contents of a safetensors file.

    Attributes:
        tensors: Name -> tensor (…) on the CPU.
        metadata: The strings in the header's `__metadata__`.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str
    size_bytes: int


def encode(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Encode tensors, on any device, as a safetensors file; the same content always gives the same bytes."""
    copies = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    return _in_order(safetensors.torch.save(copies, metadata))


def _in_order(data: bytes) -> bytes:
    """Return the file's bytes with the metadata sorted, because safetensors can write metadata in any order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Read an adapter's safetensors file; an AdapterFileError says what is missing or damaged, and where."""
    data = read_bytes(path, MAX_FILE_BYTES)
    header = parse_header(path, data)
    return TensorFile(safetensors.torch.load(data), header.metadata, sha256_bytes(data), len(data))
