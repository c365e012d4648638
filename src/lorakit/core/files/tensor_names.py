"""Names of an adapter's tensors on disk: `base_model.model.` + path of the site + what it is.

The names are PEFT's. This is their only home: saving builds names here and loading takes them apart here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
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
        if isinstance(part, LoraLayer) and adapter in part.r:
            found |= _of_layer(f"{PREFIX}{on_disk[path]}", part, adapter)
        elif isinstance(part, ModulesToSave) and adapter in part:
            for leaf, tensor in part.modules_to_save[adapter].state_dict().items():
                found[f"{PREFIX}{path}.{leaf}"] = tensor
        elif isinstance(part, TrainableTokens) and adapter in part and not part.follows:
            found[f"{PREFIX}{path}{ROWS}"] = part.token_adapter.trainable_tokens_delta[adapter]
    for path, patches in index.patches.items():
        where = inside(plain_path(path), depths)
        for leaf in [leaf for patch in patches if patch.adapter == adapter for leaf in patch.originals]:
            found[f"{PREFIX}{where}.{leaf}"] = index.everything[path]._parameters[leaf]  # type: ignore[assignment]
    return dict(sorted(found.items()))


def _of_layer(where: str, layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
    factor, kind = layer.factor(adapter), layer.kind
    first, second = kind.names
    found = {f"{where}.{first}{kind.on_disk}": factor.A, f"{where}.{second}{kind.on_disk}": factor.B}
    if factor.bias is not None:
        found[f"{where}.{second}.bias"] = factor.bias
    for own in factor.variant.tensors:
        shape = own.shape(kind, layer.slot, layer.r[adapter], factor.setting)
        found[f"{where}{own.keys[0]}"] = factor.own[own.held_as].view(shape)
    return found


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
