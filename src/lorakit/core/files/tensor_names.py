"""Names of an adapter's tensors on disk: `base_model.model.` + path of the site + what it is.

The names are PEFT's. This is their only home: saving builds names here and loading takes them apart here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import INSIDE
from lorakit.core.model.target_weights import paths_on_disk

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"

ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
    f".{MAGNITUDE}": "magnitude",
    f".{MAGNITUDE}.weight": "magnitude",  # an older PEFT wrote it so
}


@dataclass(frozen=True)
class Key:
    """A name taken apart.

    Attributes:
        path: Path of the site.
        part: "A", "B", "bias" or "magnitude".
    """

    path: str
    part: str


def parse(name: str) -> Key | None:
    """Take a name apart; None where it is not that of a factor."""
    if not name.startswith(PREFIX):
        return None
    rest = name.removeprefix(PREFIX)
    for ending, part in ENDINGS.items():
        if rest.endswith(ending):
            return Key(rest.removesuffix(ending), part)
    return None


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Everything one adapter trained, under its names on disk.

    Args:
        model: The adapted model.
        adapter: The adapter.

    Returns:
        Name -> tensor (…), the model's own, sorted by name.
    """
    found: dict[str, Tensor] = {}
    on_disk = paths_on_disk(model, adapter)
    depths = Counter(
        plain_path(on_disk.get(path, path))
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    )
    for path, module in model.named_modules():
        path = on_disk.get(path, path)
        if isinstance(module, AdapterModule):
            found |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in module.saved_tensors(adapter).items()}
        for patch in BiasPatch.on(module):
            where = inside(plain_path(path), depths)
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
