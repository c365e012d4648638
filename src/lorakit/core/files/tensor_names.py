"""Build and parse the names of an adapter's tensors on disk, which are PEFT's: `base_model.model.` + path + ending."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from lorakit.core.kinds import Kind
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.model.index import INSIDE, AdapterIndex
from lorakit.core.model.target_weights import paths_on_disk
from lorakit.core.variants import Variant, own_tensors

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"

ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
}


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
    extras = ((ending, tensor.held_as) for tensor in own_tensors() for ending in tensor.keys)
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
    extras = {tensor.held_as: tensor.keys[0].removeprefix(".") for tensor in variant.parts.extras}
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
