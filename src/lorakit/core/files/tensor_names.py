"""Names of an adapter's tensors on disk: `base_model.model.` + path of the site + what it is.

The names are PEFT's. This is their only home: saving builds names here and loading takes them apart here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.core.model.index import INSIDE, AdapterIndex
from lorakit.core.model.target_weights import paths_on_disk
from lorakit.core.variants import own_tensors

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"

ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
}


@dataclass(frozen=True)
class Key:
    """A name taken apart.

    Attributes:
        path: Path of the site.
        part: "A", "B", "bias", or the `held_as` of a variant's own tensor.
    """

    path: str
    part: str


def parse(name: str) -> Key | None:
    """Take a name apart; None where it is not that of a factor."""
    if not name.startswith(PREFIX):
        return None
    rest = name.removeprefix(PREFIX)
    own = ((ending, tensor.held_as) for tensor in own_tensors() for ending in tensor.keys)
    for ending, part in (*ENDINGS.items(), *own):
        if rest.endswith(ending):
            return Key(rest.removesuffix(ending), part)
    return None


def adapter_tensors(model: nn.Module | AdapterIndex, adapter: str) -> dict[str, Tensor]:
    """Return everything that one adapter trained, under its names on disk.

    Args:
        model: The adapted model, or its index.
        adapter: The adapter.

    Returns:
        Name -> tensor (…), the model's own, sorted by name.
    """
    index = AdapterIndex.of(model)
    found: dict[str, Tensor] = {}
    on_disk = paths_on_disk(index, adapter)
    depths = Counter(plain_path(path) for path in on_disk.values())
    for path, part in index.components.items():
        where = on_disk.get(path, path)
        found |= {f"{PREFIX}{where}.{key}": tensor for key, tensor in part.saved_tensors(adapter).items()}
    for path, patches in index.patches.items():
        where = inside(plain_path(path), depths)
        for patch in patches:
            found |= {f"{PREFIX}{where}.{key}": tensor for key, tensor in patch.saved_tensors(adapter).items()}
    return dict(sorted(found.items()))


def inside(path: str, depths: Mapping[str, int]) -> str:
    """A path in the plain base as it is where layers stand: an attention's projection is inside two of them.

    Args:
        path: The path.
        depths: Path of each adapted module -> layers around it.
    """
    words, where = path.split("."), ""
    for end, word in enumerate(words, 1):
        where += ("." if where else "") + word + INSIDE * depths.get(".".join(words[:end]), 0)
    return where


def plain_path(path: str) -> str:
    """A path in an adapted model as it is in the plain base."""
    return ".".join(word for word in path.split(".") if word not in {"base_layer", "original_module", "token_adapter"})
